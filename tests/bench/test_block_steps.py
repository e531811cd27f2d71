"""The cost of a block's step: what is compared there computes the same, and the counts are those of its operations."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from bench.block_steps import PARTS, Sizes, count_launches, count_step, floors, measure, parts_on_cpu
from bench.measure import DEVICES
from varkern.scorer import Scorer, ScorerConfig

SMALL = ScorerConfig(7, 4, 8, 6, widths=(8, 8), embedding=4, hidden=(8,))


@pytest.mark.parametrize("side, size, seed", [(2, 6, 0), (3, 6, 1), (6, 6, 2), (8, 16, 3), (13, 16, 4), (16, 16, 5)])
def test_differences_give_the_features_of_whole_maps(side, size, seed):
    torch.manual_seed(seed)
    config = ScorerConfig(7, 4, 8, size, widths=(8,) * (3 if size == 16 else 2), embedding=4, hidden=(8,))
    sizes = Sizes(batch=5, scale=1, side=side, size=size, channels=8, proposals=3)
    parts, whole, difference = parts_on_cpu(Scorer(config), sizes)
    assert list(parts) == list(PARTS)
    assert torch.allclose(whole, difference, atol=2e-5) and not torch.equal(whole[:, 0], whole[:, 1])


def test_the_window_holds_what_a_block_reaches():
    for side in (2, 3, 5, 8, 10, 13, 16):
        sizes = Sizes(1, 1, side, 16, 1)
        codes = torch.zeros(1, 1, side, side, dtype=torch.float64)
        codes[:, :, slice(*sizes.block), slice(*sizes.block)] = torch.rand(sizes.block[1] - sizes.block[0], 1) + 1
        x = F.interpolate(codes, size=(16, 16), mode="bicubic") if side < 16 else codes
        reached = F.conv2d(x, torch.rand(1, 1, 3, 3, dtype=torch.float64), padding=1)[0, 0].ne(0)
        rows = reached.any(1).nonzero().flatten()
        assert (int(rows[0]), int(rows[-1]) + 1) == sizes.window
        assert sizes.share == pytest.approx(reached.float().mean().item())


def test_the_counts_of_a_step():
    with torch.device("meta"):
        scorer = Scorer(SMALL).bfloat16()
    sizes = Sizes(batch=3, scale=1, side=6, size=6, channels=8, proposals=5)
    parts, maps, features = count_step(scorer, sizes), 3 * 5, 6 * 6 * 8
    assert sizes.block == (2, 4) and sizes.share == pytest.approx(16 / 36)
    assert parts["F"].operations == 2 * 9 * 8 * 8 * 36 * maps
    assert parts["F"].bytes == maps * features * 2 + maps * 36 * 8 + 3 * features * 4
    difference = parts["F by difference"]
    assert difference.operations == pytest.approx(2 * 9 * 8 * 8 * 16 * maps)
    assert difference.bytes == pytest.approx(maps * features * 2 + maps * 4 * 8 + 3 * features * 4 * (1 + 16 / 36))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        Scorer(SMALL)(torch.zeros(3, dtype=torch.int64), torch.randn(3, 5, 8, 6, 6), 1)
    assert parts["scorer"].operations == counter.get_total_flops()


def test_tables_have_a_row_per_searched_scale(monkeypatch):
    monkeypatch.setattr("bench.block_steps.ROUNDS", 1)
    for table in (floors(SMALL, (1, 2, 4, 6), 2, DEVICES["H100"]), measure(SMALL, (1, 2, 4, 6), 2)):
        rows = [line.split(" | ") for line in table.splitlines()[2:]]
        assert [row[0] for row in rows] == ["| 2", "| 4", "| 6"] and all(len(row) == 9 for row in rows)


def test_the_launches_of_a_step():
    """The convolutions and norms of the scorer, and four kernels around it; a search that launches more is slower."""
    of_scorer, others = count_launches(SMALL)
    assert of_scorer["convolution"] == of_scorer["map_norm"] == 2 * 7 and of_scorer["addmm"] == 2 + 2
    assert of_scorer["_to_copy"] == 3  # features and two embeddings, no weights
    assert others == {"where": 1, "fuse_tokens": 1, "nan_to_num": 1, "keep_maps": 1}
