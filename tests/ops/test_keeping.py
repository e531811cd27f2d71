"""Keeping one of several maps, against a loop over images in float64, in its PyTorch form and its Triton form."""

import math

import pytest
import torch

from varkern.ops import keep_maps, keeping, use_backend


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    with use_backend(request.param):
        yield request.param


@pytest.fixture
def poisoned(monkeypatch):
    """Results start with values that nothing else has, so that what is not written is noticed."""
    empty = keeping._empty_kept

    def filled(*given):
        maps, scores, index = empty(*given)
        return maps.fill_(99), scores.fill_(math.nan), index.fill_(-7)

    monkeypatch.setattr(keeping, "_empty_kept", filled)


def case(device, B, P, shape, dtype=torch.int64, seed=0):
    """Random (kept, score, maps, scores, noise); the maps' numbers are below 90."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.randint(0, 90, (B, *shape), generator=generator).to(dtype)
    maps = torch.randint(0, 90, (B, P, *shape), generator=generator).to(dtype)
    score, scores, noise = (torch.randn(*s, generator=generator) for s in ((B,), (B, P), (B, P + 1)))
    return [tensor.to(device) for tensor in (kept, score, maps, scores, noise)]


def by_hand(kept, score, maps, scores, noise, temperature):
    """The maps, scores and numbers of the kept maps, image by image, in Python's float64."""
    found = []
    for b in range(len(kept)):
        values = [score[b].item(), *scores[b].tolist()]
        sums = (
            values if noise is None else [v / temperature + n for v, n in zip(values, noise[b].tolist(), strict=True)]
        )
        picked = max(range(len(sums)), key=sums.__getitem__)  # of equal ones the first
        found.append((kept[b] if picked == 0 else maps[b, picked - 1], values[picked], picked))
    maps, values, numbers = zip(*found, strict=True)
    return torch.stack(maps), torch.tensor(values), torch.tensor(numbers)


CASES = [
    pytest.param(5, 8, (16,), torch.int64, id="tokens"),
    pytest.param(3, 1, (1,), torch.int64, id="one-token-one-map"),
    pytest.param(2, 7, (33 * 37,), torch.int64, id="more-than-a-block"),
    pytest.param(4, 16, (1024,), torch.int64, id="one-block-exactly"),
    pytest.param(3, 5, (9, 7), torch.uint8, id="bits"),
    pytest.param(1, 130, (6, 32), torch.uint8, id="many-maps-of-bits"),
]


@pytest.mark.parametrize(("B", "P", "shape", "dtype"), CASES)
@pytest.mark.parametrize("noisy", [True, False], ids=["noise", "best"])
def test_against_a_loop_in_float64(device, backend, poisoned, B, P, shape, dtype, noisy):
    kept, score, maps, scores, noise = case(device, B, P, shape, dtype)
    noise = noise if noisy else None
    for temperature in (1.0, 0.3):
        found = keep_maps(kept, score, maps, scores, noise=noise, temperature=temperature)
        for got, wanted in zip(found, by_hand(kept, score, maps, scores, noise, temperature), strict=True):
            assert torch.equal(got.cpu(), wanted.cpu().to(got.dtype)) and got.shape == wanted.shape
        assert found.maps.dtype == dtype and found.scores.dtype == torch.float32 and found.index.dtype == torch.int64


def test_each_map_can_be_kept(device, backend):
    P = 6
    kept, score, maps, _, _ = case(device, P + 1, P, (5,))
    noise = 50 * torch.eye(P + 1, device=device)
    found = keep_maps(kept, score, maps, torch.zeros(P + 1, P, device=device), noise=noise)
    assert found.index.tolist() == list(range(P + 1))
    assert torch.equal(found.maps[0], kept[0]) and found.scores[0] == score[0]
    assert all(torch.equal(found.maps[j], maps[j, j - 1]) for j in range(1, P + 1))


INF = math.inf


@pytest.mark.parametrize(
    ("scores", "noise", "picked"),
    [
        ([1.0, 1.0, 1.0], None, 0),
        ([0.0, 1.0, 1.0], None, 1),
        ([-INF, -INF, -INF], None, 0),
        ([-INF, -INF, -INF], [0.0, 3.0, 5.0], 0),
        ([-INF, -INF, 0.0], [9.0, 9.0, -9.0], 2),
        ([0.0, INF, INF], [9.0, 0.0, 1.0], 1),
        ([2.0, 1.0, 0.0], [0.0, 1.0, 2.0], 0),
    ],
    ids=str,
)
def test_ties_and_infinities(device, backend, scores, noise, picked):
    kept, _, maps, _, _ = case(device, 1, 2, (4,))
    given = torch.tensor([scores], device=device)
    noise = None if noise is None else torch.tensor([noise], device=device)
    found = keep_maps(kept, given[:, 0], maps, given[:, 1:], noise=noise)
    assert found.index.item() == picked and found.scores.item() == scores[picked]


def test_any_strides(device, backend, poisoned):
    given = case(device, 4, 6, (3, 5), torch.uint8)
    wanted = keep_maps(*given[:4], noise=given[4])
    spread = [torch.stack((t, t), -1).flatten(-2)[..., ::2] for t in given]
    expanded = [given[0].expand(4, 3, 5), given[1], given[2].transpose(0, 1).contiguous().transpose(0, 1), *given[3:]]
    turned = [*given[:3], *(t.T.contiguous().T for t in given[3:])]
    for kept, score, maps, scores, noise in (spread, expanded, turned):
        found = keep_maps(kept, score, maps, scores, noise=noise)
        assert all(map(torch.equal, found, wanted))


def test_more_maps_than_the_kernel_holds(device, backend, monkeypatch):
    monkeypatch.setattr(keeping, "MAX_MAPS", 3)
    kept, score, maps, scores, noise = case(device, 3, 5, (4,))
    found = keep_maps(kept, score, maps, scores, noise=noise)
    assert torch.equal(found.index.cpu(), by_hand(kept, score, maps, scores, noise, 1.0)[2])


def test_no_images(device, backend):
    found = keep_maps(*case(device, 0, 3, (4,))[:4])
    assert found.maps.shape == (0, 4) and found.scores.shape == found.index.shape == (0,)


def changed(**change):
    kept, score, maps, scores, noise = case("cpu", 2, 3, (4,))
    return {"kept": kept, "score": score, "maps": maps, "scores": scores, "noise": noise} | change


BAD = [
    ({"kept": torch.zeros(2, dtype=torch.int64)}, ValueError, r"kept must have shape \[B, l\] or .*, got \[2\]"),
    ({"kept": torch.zeros(2, 4)}, TypeError, "kept must be int64 or uint8, got torch.float32"),
    ({"maps": torch.zeros(2, 3, 5, dtype=torch.int64)}, ValueError, r"maps must have shape \[2, P, 4\].* \[2, 3, 5\]"),
    ({"maps": torch.zeros(2, 0, 4, dtype=torch.int64)}, ValueError, r"maps must have shape .*got \[2, 0, 4\]"),
    (
        {"maps": torch.zeros(2, 3, 4, dtype=torch.uint8)},
        TypeError,
        "maps must be torch.int64, as kept, got",
    ),
    ({"score": torch.zeros(2, 1)}, ValueError, r"score must have shape \[2\], got \[2, 1\]"),
    ({"scores": torch.zeros(2, 4)}, ValueError, r"scores must have shape \[2, 3\], got \[2, 4\]"),
    ({"scores": torch.zeros(2, 3).double()}, TypeError, "scores must be float32, got torch.float64"),
    ({"noise": torch.zeros(2, 3)}, ValueError, r"noise must have shape \[2, 4\], got \[2, 3\]"),
    ({"noise": torch.zeros(2, 4, device="meta")}, ValueError, "noise must be on the device of kept, cpu, got meta"),
    ({"temperature": 0.0}, ValueError, "temperature must be a finite number > 0, got 0.0"),
    ({"temperature": math.nan}, ValueError, "temperature must be a finite number > 0, got nan"),
    ({"scores": torch.zeros(2, 3, requires_grad=True)}, RuntimeError, "keep_maps defines no gradients, but scores"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[message[:40] for _, _, message in BAD])
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        keep_maps(**changed(**change))


def test_opcheck(device, backend):
    for shape, dtype, noisy in (((4,), torch.int64, True), ((4, 3), torch.uint8, False)):
        kept, score, maps, scores, noise = case(device, 2, 3, shape, dtype)
        torch.library.opcheck(
            torch.ops.varkern.keep_maps.default, (kept, score, maps, scores, noise if noisy else None, 0.5)
        )


def test_compiled_in_one_graph(device, backend):
    given = case(device, 2, 3, (4,))
    compiled = torch.compile(lambda *g: keep_maps(*g[:4], noise=g[4]).maps + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*given), keep_maps(*given[:4], noise=given[4]).maps + 1)
