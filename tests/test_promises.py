"""What is promised of every family alike: parity, no trace, safety, seeds, nesting, batches, searches.

VAR is the package's own model; FlexVAR and Infinity are stand-ins with the published structure and method.
"""

import concurrent.futures
import contextlib
import contextvars
import copy
import inspect
import pickle
import threading

import pytest
import torch

from tests.standins.cases import CASES, SEEDS, SHAPES, caches_closed, image_seeds_of, placed, same, seeds_at
from tests.standins.waits import Waits
from tests.standins.wrappers import Adapted, AdaptedTwice
from varkern import BestOfM, DensitySearch, patch, patched, unpatch
from varkern.families import recognise
from varkern.ops import use_backend
from varkern.search import Choice

MULTINOMIAL = {"sampler": "multinomial"}
EVERY = pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES)
OPTIONS = [
    (f"{name}: {what}", case, options) for name, case in CASES.items() for what, options in case.published.items()
]
DUPLICATES = {"copy": copy.copy, "deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model))}
PRECISIONS = {"float32": contextlib.nullcontext, "bfloat16": lambda: torch.autocast("cpu", torch.bfloat16)}
# Every option in both precisions, one of them with a seed and the other with PyTorch's own random state, in turn.
PARITY = [
    pytest.param(case, options, context, (3, None)[(place + number) % 2], id=f"{name}, {precision}")
    for place, (name, case, options) in enumerate(OPTIONS)
    for number, (precision, context) in enumerate(PRECISIONS.items())
]


class Recording:
    """Draws M candidates at every scale, keeps the first, and remembers all it was offered."""

    def __init__(self, m):
        self.m, self.offered = m, []

    def check(self, spec):
        self.spec = spec

    def check_labels(self, highest, spec): ...

    def num_candidates(self, scale, num_scales):
        return self.m

    def choose(self, candidates):
        self.offered.append(candidates)
        return Choice(torch.zeros(len(candidates.tokens), dtype=torch.int64), candidates.uniforms())


def weighed(labels, features, scale):
    return (features * torch.arange(1.0, features.shape[2] + 1).view(-1, 1, 1)).mean((2, 3, 4)) * 10


def states(model):
    return [torch.get_rng_state(), model.rng.get_state()]


@pytest.mark.parametrize("case, options, precision, seed", PARITY)
def test_one_multinomial_candidate_is_the_published_method_bit_for_bit(case, options, precision, seed):
    model = case.build()
    with precision():
        torch.manual_seed(9)
        published, left = case.call(model, seed, **options), states(model)
        for loop in ("fused", "own"):
            with patched(model, loop=loop, **MULTINOMIAL):
                torch.manual_seed(9)
                ours = case.call(model, seed, **options)
            assert same(ours, published), f"{loop} loop"
            assert all(map(torch.equal, states(model), left)), f"random states after the {loop} loop"
            assert caches_closed(case, model)


@EVERY
def test_parity_goes_through_the_patch(case):
    # Should the comparison above compare the published method with itself, this fails.
    model = case.build()
    with patched(model, **MULTINOMIAL), torch.no_grad():
        case.attentions(model)[0].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("here")))
        with pytest.raises(RuntimeError, match="here") as caught:
            case.call(model, 0)
    assert any(frame.path.name == "patching.py" for frame in caught.traceback)


@EVERY
def test_a_greedy_draw_gives_one_image_to_every_sampler(case):
    """The fused way, at the most probable token of each scale, against the published one, which rounds otherwise."""
    model = case.build()
    published = case.images(case.call(model, 0, top_k=1))
    with patched(model):
        ours = case.images(case.call(model, 5, top_k=1))
    if published.dtype == torch.uint8:  # decoded values are cut off, not rounded
        assert (ours.int() - published.int()).abs().max() <= 1
    else:
        assert torch.allclose(ours, published, atol=1e-4)


@EVERY
def test_patching_leaves_no_trace(case):
    model = case.build()
    published = case.call(model, 3)
    before, order, text, signature = (
        dict(vars(model)),
        list(vars(model)),
        repr(model),
        inspect.signature(model.autoregressive_infer_cfg),
    )
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert patch(patch(model), BestOfM(weighed, m=2)) is model
    assert set(vars(model)) - set(before) == {"autoregressive_infer_cfg", "__getstate__"}
    assert inspect.signature(model.autoregressive_infer_cfg) == signature and repr(model) == text
    searched = case.call(model, 3)
    assert not same(searched, published)
    assert b"PatchedMethod" not in pickle.dumps(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same(case.call(twin, 3), published)
    assert same(case.call(model, 3), searched)
    unpatch(model)
    assert list(vars(model)) == order and all(vars(model)[name] is value for name, value in before.items())
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in weights.items())
    assert same(case.call(model, 3), published)


BUILDS = {"plain": lambda model: model, "wrapped": Adapted, "twice": AdaptedTwice}
COPIES = [  # all of them for VAR; for another family each kind of copy and each kind of wrapper once
    pytest.param(case, build, duplicate, id=f"{name}, {what}, {how}")
    for place, (name, case) in enumerate(SHAPES.items())
    for i, (what, build) in enumerate(BUILDS.items())
    for j, (how, duplicate) in enumerate(DUPLICATES.items())
    if name == "VAR" or (i + j + place) % 3 == 0
]


@pytest.mark.parametrize("case, build, duplicate", COPIES)
def test_copies_hold_no_patch(case, build, duplicate):
    """Also of a wrapper that finds the method through ``__getattr__``, which fails before a copy has its state."""
    model = build(case.build())
    published, before = case.call(model, 3), list(vars(model))
    patch(model, BestOfM(weighed, m=2))
    searched, twin = case.call(model, 3), duplicate(model)
    assert list(vars(twin)) == before and type(twin) is type(model)
    assert same(case.call(twin, 3), published)
    patch(twin, BestOfM(weighed, m=3))
    assert not same(case.call(twin, 3), searched) and same(case.call(model, 3), searched)
    unpatch(twin)
    assert list(vars(twin)) == before and same(case.call(twin, 3), published)
    if duplicate is not copy.copy:
        with torch.no_grad():
            twin.get_logits.__self__.head.weight.zero_()
        assert not same(case.call(twin, 3), published)
    assert same(case.call(model, 3), searched)
    assert same(case.call(unpatch(model), 3), published) and list(vars(model)) == before


@EVERY
def test_one_model_serves_one_thread_at_a_time(case):
    model, inside, go, here = case.build(), threading.Event(), threading.Event(), threading.get_ident()

    def waiting(labels, features, scale):
        assert go.is_set() or threading.get_ident() != here, "a second call runs, which would wait for itself"
        inside.set()
        assert go.wait(60)
        return weighed(labels, features, scale)

    alone = case.call(patch(model, BestOfM(weighed, m=2)), 3)
    patch(model, BestOfM(waiting, m=2))
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        first = pool.submit(contextvars.copy_context().run, case.call, model, 3)  # with the backend of the tests
        try:
            assert inside.wait(60)
            for other in (model, Adapted(model), patch(Adapted(model))):  # they share the blocks and their caches
                with pytest.raises(RuntimeError, match="is generating in another thread, and its KV caches serve one"):
                    case.call(other, 4)
            with patched(case.build(), BestOfM(weighed, m=2)) as free:
                assert same(case.call(free, 3), alone)
        finally:
            go.set()
        assert same(first.result(), alone)
    assert caches_closed(case, model) and same(case.call(model, 3), alone)


@EVERY
@pytest.mark.parametrize("sampler", ["philox", "multinomial"])
def test_a_call_inside_the_models_own_generation_is_refused(case, sampler):
    model, refused, inside = case.build(), [], []

    def calling(labels, features, scale):
        assert not inside, "the call inside runs, and would call itself without end"
        if len(refused) < 2:
            inside.append(scale)
            try:
                case.call(model, 4)
            except RuntimeError as error:
                refused.append(str(error))
                if len(refused) == 2:
                    raise
            finally:
                inside.clear()
        return weighed(labels, features, scale)

    alone = case.call(patch(model, BestOfM(weighed, m=2), sampler=sampler), 3)
    patch(model, BestOfM(calling, m=2), sampler=sampler)
    with pytest.raises(RuntimeError, match="was called inside its own generation, as by a scorer, which would"):
        case.call(model, 3)
    assert caches_closed(case, model) and same(case.call(model, 3), alone)
    refused.pop()
    with pytest.raises(RuntimeError, match="inside its own"):
        case.call(model, 3)
    refused.clear()

    def once(labels, features, scale):
        if not refused:
            with pytest.raises(RuntimeError, match="inside its own"):
                case.call(model, 4)
            refused.append(scale)
        return weighed(labels, features, scale)

    assert same(case.call(patch(model, BestOfM(once, m=2), sampler=sampler), 3), alone) and refused == [1]


@EVERY
@pytest.mark.parametrize("sampler", ["philox", "multinomial"])
def test_an_exception_leaves_the_model_usable(case, sampler):
    model, calls = case.build(), []
    published = case.call(model, 3)

    def failing(labels, features, scale):
        calls.append(scale)
        if len(calls) in (1, 4):
            raise RuntimeError("the scorer failed")
        return weighed(labels, features, scale)

    patch(model, BestOfM(failing, m=2), sampler=sampler)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="the scorer failed"):
            case.call(model, 3)
        assert caches_closed(case, model)
    images = case.call(model, 3)
    handle = case.attentions(model)[-1].register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        case.call(model, 3)
    handle.remove()
    assert caches_closed(case, model)
    assert same(case.call(model, 3), images)
    assert same(case.call(unpatch(model), 3), published)


@EVERY
def test_what_a_seed_means(case):
    model = patch(case.build(), BestOfM(weighed, m=2))
    left = states(model)
    by_number = case.call(model, 9)
    assert same(by_number, case.call(model, image_seeds_of(9)))
    assert not same(by_number, case.call(model, 10))
    assert all(map(torch.equal, states(model), left))  # a seed leaves every generator alone
    torch.manual_seed(5)
    first, second = case.call(model, None), case.call(model, None)
    torch.manual_seed(5)
    assert same(case.call(model, None), first) and not same(first, second)
    patch(model, **MULTINOMIAL)
    with pytest.raises(ValueError, match="must be an int or None for sampler 'multinomial'"):
        case.call(model, SEEDS)


STRENGTHS = {
    "VAR": ({"cfg": 2.5}, {"cfg": torch.full((1, 1, 1), 2.5)}),
    "FlexVAR": ({"cfg": 2.5}, {"cfg": torch.full((1, 1, 1), 2.5)}),
    "Infinity": (
        {"cfg_list": [2.5, 3.0, 1, 0.5, 2.0], "tau_list": [0.5, 2.0, 0.25, 0.75, 1.0]},
        {
            "cfg_list": [torch.tensor(2.5), torch.tensor(3.0), torch.tensor(1.0), 0.5, torch.tensor(2.0)],
            "tau_list": [0.5, torch.tensor(2.0), torch.full((1, 1, 1), 0.25), torch.tensor([0.75]), torch.tensor(1.0)],
        },
    ),
}


@pytest.mark.parametrize("name", STRENGTHS)
@pytest.mark.parametrize("loop", ["fused", "own"])
def test_a_number_in_a_tensor_means_the_number(name, loop):
    case, (numbers, tensors) = CASES[name], STRENGTHS[name]
    model = patch(case.build(), BestOfM(weighed, m=2), loop=loop)
    wanted = case.call(model, SEEDS, **numbers)
    assert same(case.call(model, SEEDS, **tensors), wanted)
    assert not same(case.call(model, SEEDS), wanted)


@EVERY
def test_candidates_nest(case):
    """Under a search that keeps the first, candidates 0..M-1 are those of any larger M, and 0 is what M=1 draws."""
    model, offered = case.build(), {}
    for m in (2, 4, 8):
        search = Recording(m)
        with patched(model, search):
            images = case.call(model, SEEDS)
        offered[m] = [candidates.tokens for candidates in search.offered]
        with patched(model):
            assert same(case.call(model, SEEDS), images)
    for scale, eight in enumerate(offered[8]):
        assert eight.shape == (5, 8, *case.shapes[scale])
        assert all(torch.equal(offered[m][scale], eight[:, :m]) for m in (2, 4))
    assert not torch.equal(eight[:, 0], eight[:, 1])


@EVERY
@pytest.mark.parametrize("pick", ["best", "resample"])
def test_an_image_depends_on_its_own_seed_alone(case, pick):
    model = case.build()

    class Recorded(BestOfM):
        def choose(self, candidates):
            tokens.append(candidates.tokens)
            return super().choose(candidates)

    patch(model, Recorded(weighed, m=3, first_scale=0, pick=pick))
    tokens = []
    case.call(model, SEEDS)
    whole = tokens
    for places in ([4, 1], [2]):
        tokens = []
        case.call(model, seeds_at(places), places)
        assert len(tokens) == len(whole) == 5
        for scale, (part, all_tokens) in enumerate(zip(tokens, whole, strict=True)):
            assert torch.equal(part, all_tokens[places]), f"places {places}, scale {scale}"


@EVERY
def test_what_a_search_is_offered(case):
    model = case.build()
    search = Recording(3)
    given = case.arguments(range(5))
    with patched(model, search):
        images = case.images(case.call(model, SEEDS))
    assert [c.scale for c in search.offered] == list(range(5)) and {c.num_scales for c in search.offered} == {5}
    assert (search.spec.num_scales, search.spec.channels, search.spec.size) == (5, case.size[0], case.size[1:])
    assert search.spec.device == torch.device("cpu")
    for candidates in search.offered:
        labels = given.get("label_B", given.get("label_B_or_BLT"))
        assert same(candidates.labels, labels)
        assert candidates.uniforms().shape == (5, 3)
        if candidates.tokens.dtype == torch.uint8:
            assert candidates.codebook is None and candidates.code_scale == pytest.approx(5**-0.5)
            assert candidates.tokens.max() == 1 and search.spec.vocabulary is None
        else:
            assert candidates.codebook.shape == (search.spec.vocabulary, case.size[0])
            assert candidates.code_scale is None and candidates.tokens.dtype == torch.int64
    assert images.shape[0] == 5


@EVERY
def test_the_features_of_what_is_kept_are_the_images(case):
    """F(.) of the last scale's kept candidate, decoded, is what the method returns."""
    model, kept = case.build(), []

    class Last(Recording):
        def choose(self, candidates):
            whole, part = candidates.fuse(0, 3), candidates.fuse(1, 3, torch.bfloat16, channels_last=True)
            assert whole.dtype == torch.float32 and whole.shape == (5, 3, *case.size)
            assert part.dtype == torch.bfloat16 and torch.allclose(part.float(), whole[:, 1:], atol=0.05, rtol=0.01)
            assert part.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
            assert not torch.allclose(whole[:, 0], whole[:, 2]) or candidates.scale < 2
            kept.append(whole[:, 2])
            return Choice(torch.full((5,), 2), candidates.uniforms())

    with patched(model, Last(3)):
        images = case.images(case.call(model, SEEDS))
    decoded = case.decoded(model, kept[-1])
    if images.dtype == torch.uint8:
        assert (decoded.int() - images.int()).abs().max() <= 1
    else:
        assert torch.allclose(decoded, images, atol=1e-4)


@EVERY
@pytest.mark.parametrize("sampler", ["philox", "multinomial"])
def test_searches_run(case, sampler):
    model, judged = case.build(), []

    def scorer(labels, features, scale):
        judged.append((scale, labels))
        return weighed(labels, features, scale)

    published = case.call(model, 3)
    outcomes = [case.call(patch(model, sampler=sampler), 3)]
    for search in (
        BestOfM(scorer, m=4),
        BestOfM(scorer, m=4, pick="resample", temperature=0.5, maps_at_once=7),
        DensitySearch(n=12, representatives=4, scales=(1, 2)),
        [DensitySearch(n=12, representatives=4, alpha=1.0, scales=(1,), min_distance=0), BestOfM(scorer, m=2)],
    ):
        with patched(model, search, sampler=sampler):
            outcomes.append(case.call(model, 3))
            assert same(case.call(model, 3), outcomes[-1])
    assert {scale for scale, _ in judged} == {1, 2, 3, 4}
    assert all(same(labels, case.labels) for _, labels in judged)
    for images in outcomes:
        assert case.images(images).shape == case.images(published).shape
        assert case.images(images).dtype == case.images(published).dtype
    assert sum(same(first, second) for first in outcomes for second in outcomes) == len(outcomes)


@EVERY
def test_the_host_reads_nothing_of_the_device_while_it_generates(case, monkeypatch):
    monkeypatch.setattr("varkern.checks.label_range", lambda request, spec: (0, 5))
    model = patch(case.build(), BestOfM(weighed, m=3, pick="resample"))
    with Waits() as waits:
        case.call(model, SEEDS)
    assert waits.count == 0


FEW = {
    "FlexVAR": {"infer_patch_nums": (1, 2, 3)},
    "Infinity": {"trunk_scale": 3},
    "Infinity, patchify": {"trunk_scale": 2},
}


@pytest.mark.parametrize("name, options", FEW.items(), ids=FEW)
def test_the_kernels_give_the_same_images(name, options, device):
    """Triton's kernels, on a GPU if there is one, else interpreted, against the plain PyTorch forms on the CPU."""
    case, told = CASES[name], []
    for backend, where in (("torch", torch.device("cpu")), ("triton", device)):
        model = case.build().to(where)
        model.rng = torch.Generator(where)
        given = placed({**case.arguments([0, 1]), **options, "g_seed": seeds_at([0, 1])}, where)
        with use_backend(backend), patched(model, BestOfM(weighed, m=2)):
            told.append(case.images(model.autoregressive_infer_cfg(**given)).cpu())
    assert (told[0].double() - told[1].double()).abs().max() <= (1 if told[0].dtype == torch.uint8 else 1e-3)


@EVERY
def test_no_images(case):
    model = case.build()
    for search in (None, BestOfM(weighed, m=2)):
        with patched(model, search):
            assert case.images(case.call(model, 0, ())).shape[0] == 0


@EVERY
def test_each_is_its_own_family(case):
    name = next(name for name, other in CASES.items() if other is case).split(",")[0]
    assert recognise(case.build()).name == name
