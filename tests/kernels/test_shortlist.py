"""The shortlist that the first of the two sampling kernels writes for the second."""

import pytest
import torch
from varkern.kernels.sampling import plan
from varkern.kernels.sampling_shortlist import HEADER, shortlist_kernel


@pytest.mark.parametrize("vocab", [4096, 3000])
@pytest.mark.parametrize("top_k, capacity", [(900, 1024), (100, 128), (1, 64)])
def test_the_largest_logits_in_order_and_not_too_many(top_k, capacity, vocab, device):
    sizes = plan(vocab, 1, top_k)
    assert sizes["kind"] == "shortlist" and sizes["sample"]["CAPACITY"] == capacity
    x = torch.randn(3, vocab, generator=torch.Generator().manual_seed(0)) * 3
    x[1] = x[1].exp()  # skewed: the first guess misses
    x[2, ::2] = -torch.inf
    values = torch.full((3, capacity), torch.nan, device=device)
    columns = torch.full((3, capacity), -1, dtype=torch.int16, device=device)
    headers = torch.full((3, HEADER.value), torch.nan, device=device)
    shortlist_kernel[(3,)](
        x.to(device), None, None, headers, values, columns, vocab, 0, 0, 0,
        1, vocab, 0.0, None, top_k, sizes["deviations"], sizes["spacing"], **sizes["shortlist"], enable_fp_fusion=False,
    )  # fmt: skip
    for row, got, place, header in zip(x, values.cpu(), columns.cpu().long(), headers.tolist(), strict=True):
        count, low = int(header[0]), header[1]
        assert top_k <= count <= capacity and low <= got[:count].min()
        wanted = row.topk(count).indices.sort().values
        assert torch.equal(place[:count], wanted) and torch.equal(got[:count], row[wanted])
        assert got[count:].isnan().all() and (place[count:] == -1).all()
