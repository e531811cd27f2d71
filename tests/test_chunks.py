"""How many maps are scored at a time, and whether a graph is replayed, changes no image, for every M and every rule.

Chunking and capture may change one thing only: a scorer's rounding, where its matrix products round by the number of
rows. So a scorer that is a plain function of each map is held to equal bits, and the trained kind of scorer, a
convolutional network, to scores within rounding and to choices that such a difference can explain.
"""

import math

import pytest
import torch

import varkern
from tests.helpers import on, small_scorer, small_var
from tests.test_graphs import capture  # noqa: F401
from varkern import BestOfM, generate
from varkern.ops import use_backend
from varkern.ops.philox import PICKS, gumbel, uniforms

PICKS_OF = ("best", "resample", 2)
# Every rule with few candidates, and each larger number of them with one rule.
CANDIDATES = [(7, pick) for pick in PICKS_OF]
CANDIDATES += [(1, "best"), (2, "resample"), (3, 2), (16, "best"), (33, 2), (128, "resample")]
OF_A_NETWORK = [(7, pick) for pick in PICKS_OF] + [(2, "best"), (33, 2), (128, "resample")]
LABELS = torch.tensor([3, 0, 5, 5, 2])
SEEDS = torch.tensor([11, -4, 2**62, 7, 0])
B = len(LABELS)
MANY = 10**9
# 3 at a time divides neither 4, 7, 16 nor 128; 7 neither 16, 33 nor 128.
MAPS_AT_ONCE = {"1": 1, "B": B, "between": 3 * B, "not a multiple of B": 7 * B + 4, "all": MANY}
SAMPLING = {"cfg": 2.0, "top_k": 30, "top_p": 0.9}
METHOD = "autoregressive_infer_cfg"


def chunks_of(m):
    """The sizes of chunks for ``m`` candidates: of 128 single maps, each is scored as each of 33 is."""
    return {name: maps for name, maps in MAPS_AT_ONCE.items() if maps > 1 or m <= 33}


def counted(labels, features, scale):
    """A function of every map alone, in integers, whose sums do not round: the same in any company, on any device."""
    steps = (features * 4).round().long()
    weights = torch.arange(1, features.shape[2] + 1, device=features.device).view(-1, 1, 1)
    return ((steps * weights).sum((2, 3, 4)) % 4001).float() / 400 + labels.unsqueeze(1) * 0.01 + scale


def assert_equal(told, wanted, what):
    """Bit for bit, but for the time it took."""
    for name in ("tokens", "choices", "scores"):
        for scale, (found, right) in enumerate(zip(getattr(told, name), getattr(wanted, name), strict=True)):
            same = found is None if right is None else torch.equal(found, right)
            assert same, f"{name} of scale {scale}, {what}"
    assert torch.equal(told.images, wanted.images), f"images, {what}"


def called(model, seeds):
    return getattr(model, METHOD)(B, LABELS.to(model.lvl_1L.device), g_seed=seeds, **SAMPLING)


def replayed(model):
    """Images of a patched model's method, from a replay of what other seeds captured."""
    called(model, SEEDS + 1)
    return called(model, SEEDS)


@pytest.mark.parametrize("m, pick", CANDIDATES)
def test_a_scorer_of_single_maps_gives_equal_bits(m, pick, device, quick_backend, capture):  # noqa: F811
    """Tokens, choices, scores and images by ``generate``; the images by the patched method and by a replayed graph."""
    model = on(small_var(), device)
    with use_backend(quick_backend):
        wanted = generate(model, LABELS, seeds=SEEDS, search=BestOfM(counted, m=m, pick=pick), **SAMPLING)
        for name, maps in chunks_of(m).items():
            search = BestOfM(counted, m=m, pick=pick, maps_at_once=maps)
            assert_equal(generate(model, LABELS, seeds=SEEDS, search=search, **SAMPLING), wanted, f"{name} at once")
            if name in ("between", "all"):
                captures = len(capture)
                with varkern.patched(model, search, cuda_graph=True):
                    assert torch.equal(replayed(model), wanted.images), f"a graph, {name} at once"
                assert len(capture) == captures + 1
            else:
                with varkern.patched(model, search):
                    assert torch.equal(called(model, SEEDS), wanted.images), f"patched, {name} at once"
    chosen = [choice for choice in wanted.choices if choice is not None]
    assert len(chosen) == (4 if m > 1 else 0)
    assert m == 1 or torch.stack(chosen).unique().numel() > 1  # a search that keeps candidate 0 would prove nothing


def possible(scores, noise, pick, error):
    """Which candidates ``[B, M]`` a rule may keep if every score is off by at most ``error``."""
    count = {"best": 1, "resample": scores.shape[1]}.get(pick, pick)
    if count >= scores.shape[1]:
        surely_in, maybe_in = torch.ones(2, *scores.shape, dtype=torch.bool)
    else:
        ordered = scores.sort(descending=True).values
        surely_in = scores > ordered[:, count : count + 1] + 2 * error
        maybe_in = scores >= ordered[:, count - 1 : count] - 2 * error
    if pick == "best":
        return maybe_in
    total = scores + noise
    least = total.masked_fill(~surely_in, -math.inf).amax(1, keepdim=True)
    return maybe_in & (total >= least - 2 * error)


@pytest.mark.parametrize("m, pick", OF_A_NETWORK)
def test_a_network_chooses_the_same_but_for_its_rounding(m, pick, device, quick_backend, capture):  # noqa: F811
    """As long as an image's maps are the same, scores agree to 2e-6, and the kept map is one that a difference of
    2e-6 in the scores explains. Where no other map can be explained, the maps are thereby equal; that is so for more
    than eight in ten choices. Images whose maps are all equal are equal bit for bit, since they are fused alone.
    """
    error = 2e-6  # the scores' spread is 0.01, their rounding some 4e-7
    model, scorer = on(small_var(), device), small_scorer()
    told = {}
    with use_backend(quick_backend):
        for name in ("between", "all") if m > 33 else ("1", "between", "all"):
            search = BestOfM(scorer, m=m, pick=pick, maps_at_once=MAPS_AT_ONCE[name])
            told[name] = generate(model, LABELS, seeds=SEEDS, search=search, **SAMPLING)
        with varkern.patched(model, search, cuda_graph=True):
            assert torch.equal(replayed(model), told["all"].images), "a graph"
        offered = recorded_tokens(model, BestOfM(scorer, m=m, pick=pick))
    wanted, settled, choices = told.pop("all"), 0, 0
    for name, found in told.items():
        same = torch.ones(B, dtype=torch.bool)  # images that are still the same
        for scale in range(1, 5):
            scores, other = wanted.scores[scale].cpu(), found.scores[scale].cpu()
            assert (scores - other)[same].abs().max() <= error, f"scale {scale}, {name} at once"
            noise = gumbel(uniforms(SEEDS, m, 1, scale, PICKS)[:, :, 0])
            allowed = possible(scores, noise, pick, error)
            choice = found.choices[scale].cpu()
            assert allowed.gather(1, choice[:, None])[same].all(), f"scale {scale}, {name} at once"
            assert allowed.gather(1, wanted.choices[scale].cpu()[:, None]).all()
            kept = wanted.tokens[scale].cpu()
            alike = (offered[scale].cpu() == kept[:, None]).all(-1)  # duplicates of the kept map
            settled += ((allowed <= alike).all(1) & same).sum().item()
            choices += same.sum().item()
            same &= (found.tokens[scale].cpu() == kept).all(1)
        assert torch.equal(found.images.cpu()[same], wanted.images.cpu()[same])
    assert choices >= 15 * len(told) and settled > 0.8 * choices


def recorded_tokens(model, search):
    """The candidates ``[B, M, l]`` of every scale."""
    offered, choose = {}, search.choose

    def recording(candidates):
        offered[candidates.scale] = candidates.tokens
        return choose(candidates)

    search.choose = recording
    generate(model, LABELS, seeds=SEEDS, search=search, **SAMPLING)
    return offered


NEAR = [0.0, 3.0, 3.00001, 1.0, 2.0]


@pytest.mark.parametrize(
    "scores, noise, pick, error, wanted",
    [
        pytest.param(NEAR, [0.0] * 5, "best", 1e-5, [1, 2], id="two best within the error"),
        pytest.param(NEAR, [0.0] * 5, "best", 1e-6, [2], id="two best beyond it"),
        pytest.param(NEAR, [9.0, 0, 0, 0, 0], "resample", 1e-5, [0], id="noise decides among all"),
        pytest.param(NEAR, [9.0, 0, 0, 0, 0], 2, 1e-5, [1, 2], id="but not beyond the two best"),
        pytest.param(NEAR, [0.0, 0, 1, 0, 9], 2, 1e-5, [2], id="noise decides between those"),
        # Second and third may change places: with 0 and 1 in the draw 1 wins, with 1 and 2 it is 2.
        pytest.param([2.0, 3.0, 1.99999, 0.0], [0.0, 0, 5, 9], 2, 1e-5, [1, 2], id="two candidates for the last place"),
    ],
)
def test_what_a_difference_explains(scores, noise, pick, error, wanted):
    """The measure of the test above, by cases worked out by hand."""
    found = possible(torch.tensor([scores]), torch.tensor([noise]), pick, error)
    assert found[0].nonzero().flatten().tolist() == wanted
