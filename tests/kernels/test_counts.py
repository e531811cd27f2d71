"""The emulator's counts of what compiled kernels execute, so that causes of former slowness do not come back.

Counts depend on the compiler, not on the machine. They are tested as ratios, with a margin for other Triton versions.
"""

import pytest
import torch

from tests import emulator
from varkern import ops
from varkern.ops import use_backend

pytestmark = pytest.mark.compiled_only
GENERATOR = torch.Generator().manual_seed(3)
LOGITS = torch.randn(2, 4, 4096, generator=GENERATOR) * 2.5


def count(run) -> dict[str, dict[str, int]]:
    """The counts of each kernel that ``run`` launches, by its name."""
    for totals in emulator.launched.values():
        totals.reset()
    with use_backend("triton"):
        run()
    return {t.kernel.name: emulator.summarise(t) for t in emulator.launched.values() if t.launches}


def sample(logits, **filters):
    seeds = torch.arange(2)
    counts = count(lambda: ops.sample_tokens(logits, 1, seeds=seeds, **filters))
    return {name: found["instructions"] for name, found in counts.items()}


def test_half_precision_fusion_has_no_bank_conflicts():
    """With a pipelined loop, reading lookups from shared memory took 15,648 wavefronts per map instead of 5,832."""
    tokens = torch.randint(0, 4096, (1, 8, 169), generator=GENERATOR)
    codebook, f_hat = torch.randn(4096, 32, generator=GENERATOR), torch.zeros(1, 32, 16, 16)
    phi = (torch.randn(32, 32, 3, 3, generator=GENERATOR), torch.randn(32, generator=GENERATOR), 0.5)
    options = {"f_hat": f_hat, "phi": phi, "dtype": torch.bfloat16, "channels_last": True}
    found = count(lambda: ops.fuse_tokens(tokens, codebook, side=13, size=(16, 16), **options))
    assert found["fuse_resized_kernel"]["wavefronts"] / 8 < 7500


def test_half_precision_logits_cost_little_more():
    filters = {"top_k": 900, "top_p": 0.96}
    rounded = LOGITS.bfloat16()
    whole, half = sample(rounded.float(), **filters), sample(rounded, **filters)
    assert half["shortlist_kernel"] < 1.4 * whole["shortlist_kernel"]


@pytest.mark.parametrize("filters", [{"top_k": 900, "top_p": 0.96}, {"top_p": 0.96}], ids=["both", "nucleus"])
def test_ties_at_the_nucleus_cost_less_than_twice(filters):
    plain, tied = sample(LOGITS, **filters), sample(LOGITS.bfloat16().float(), **filters)
    assert sum(tied.values()) < 1.85 * sum(plain.values())


def test_a_row_costs_no_more_for_128_draws_than_twice():
    seeds, filters = torch.arange(2), {"top_k": 900, "top_p": 0.96}
    one = sum(sample(LOGITS, **filters).values())
    many = count(lambda: ops.sample_tokens(LOGITS, 128, seeds=seeds, **filters))
    assert sum(found["instructions"] for found in many.values()) < 2.2 * one
