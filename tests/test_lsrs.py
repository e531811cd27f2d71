"""The method that LSRS adds to VAR: patched against a slow loop of its own, argument by argument; and no trace."""

import copy
import inspect
import pickle

import pytest
import torch

from tests.helpers import NUM_CLASSES, caches_closed, idle, on, random_states, small_scorer, small_var
from tests.standins.lsrs import LSRSVAR, map_network, small_lsrs
from tests.test_waiting import far, no_waiting
from varkern import BestOfM, PublishedScorer, generate, image_seeds, patch, patched, unpatch
from varkern.lsrs import WRAPPED, CalledSearch
from varkern.models import VAR
from varkern.ops import use_backend

METHOD = "autoregressive_infer_cfg_lsrs"
BOTH = {METHOD, "autoregressive_infer_cfg"}
LABELS = torch.tensor([3, 0, 5])
MULTINOMIAL = {"sampler": "multinomial"}


@pytest.fixture(scope="module")
def network():
    return map_network()


def call(model, network, g_seed=0, B=3, label_B=LABELS, global_seed=99, **options):
    """One call from a known state of PyTorch's default generator: the images, and the random states it left."""
    torch.manual_seed(global_seed)
    options = {"discriminator": network, "ed": 5, **options}
    images = getattr(model, METHOD)(B, label_B, g_seed, **options)
    return images, random_states(model)


OPTIONS = {
    "defaults": {"ed": 10},
    "m_k=1": {"m_k": 1},
    "m_k=4": {"m_k": 4},
    "m_k=16": {"m_k": 16},
    "from the first scale": {"st": 0, "m_k": 4},
    "one scale": {"st": 2, "ed": 3, "m_k": 8},
    "up to a scale": {"st": 1, "ed": 3, "m_k": 8},
    "no scale": {"st": 4, "ed": 2},
    "beyond both ends": {"st": -3, "ed": 50, "m_k": 3},
    "one random map": {"rand_list": [0]},
    "random maps, searched": {"rand_list": (0, 2, 4), "m_k": 6},
    "random maps, all": {"rand_list": range(20), "st": 0},
    "no random map": {"rand_list": []},
    "two best": {"top_k_lsrs": 2},
    "three best, cold": {"top_k_lsrs": 3, "temperature_lsrs": 0.1, "m_k": 8},
    "five best of four": {"top_k_lsrs": 5, "temperature_lsrs": 3.0},
    "a temperature without a pick": {"temperature_lsrs": -2.0},
    "all of it": {"st": 1, "ed": 4, "m_k": 5, "rand_list": [1], "top_k_lsrs": 3, "temperature_lsrs": 0.5},
    "filtered": {"top_k": 20, "top_p": 0.9, "cfg": 4.0},
    "no guidance": {"cfg": 0},
    "by image": {"cfg": torch.tensor([0.5, 3.0, 1.0]).view(3, 1, 1)},
    "smooth, which does nothing": {"more_smooth": True},
    "drawn labels": {"label_B": None},
    "one label": {"label_B": 2},
}


class TestEqualDraws:
    """With ``sampler="multinomial"``: the images of the method's own loop."""

    @pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
    def test_images_are_the_methods_own(self, options, network):
        model = small_lsrs()
        for seed in (7, None):
            wanted, left = call(model, network, seed, **options)
            with patched(model, **MULTINOMIAL):
                got, ours = call(model, network, seed, **options)
            assert got.dtype == wanted.dtype and torch.allclose(got, wanted, rtol=0, atol=1e-4), seed
            assert all(map(torch.equal, ours, left)), f"random states after seed {seed}"
        assert caches_closed(model)

    def test_many_candidates(self, network):
        """Rounding may decide between two candidates of nearly equal scores, so one image in eight may differ."""
        model, differing = small_lsrs(), 0
        for seed in range(8):
            wanted, _ = call(model, network, seed, m_k=64, B=1, label_B=LABELS[:1])
            with patched(model, **MULTINOMIAL):
                got, _ = call(model, network, seed, m_k=64, B=1, label_B=LABELS[:1])
            differing += not torch.allclose(got, wanted, rtol=0, atol=1e-4)
        assert differing <= 1

    def test_options_matter(self, network):
        """Should an argument do nothing on either side, the comparison above would not show it."""
        model = small_lsrs()
        silent = {"defaults", "m_k=4", "no random map", "a temperature without a pick", "smooth, which does nothing"}
        silent |= {"beyond both ends", "no scale"}  # told by the scales that are searched, below
        plain, _ = call(model, network)
        for name, options in OPTIONS.items():
            same = torch.equal(call(model, network, **options)[0], plain)
            assert same or name not in silent - {"beyond both ends", "no scale"}, name
            assert not same or name in silent, name
        assert torch.equal(call(model, network, st=4, ed=2)[0], call(model, network, m_k=1)[0])

    def test_the_pick_is_drawn_from_the_default_generator(self, network):
        model = patch(small_lsrs(), **MULTINOMIAL)
        options = {"top_k_lsrs": 4, "temperature_lsrs": 10.0, "m_k": 8}
        first, second = (call(model, network, 3, global_seed=seed, **options)[0] for seed in (1, 2))
        assert not torch.equal(first, second)
        assert torch.equal(call(model, network, 3, global_seed=1, **options)[0], first)

    def test_the_comparison_goes_through_the_patch(self, network):
        # Should the comparisons above compare the unpatched method with itself, this fails.
        model = patch(small_lsrs(), **MULTINOMIAL)
        model.blocks[0].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("here")))
        with pytest.raises(RuntimeError, match="here") as caught:
            call(model, network)
        assert any(frame.path.name == "patching.py" for frame in caught.traceback)
        assert caches_closed(model)

    def test_half_precision(self, network):
        model = small_lsrs()
        with torch.autocast("cpu", torch.bfloat16):
            wanted, left = call(model, network, m_k=1)
            with patched(model, **MULTINOMIAL):
                got, ours = call(model, network, m_k=1)
        assert got.dtype == wanted.dtype and torch.allclose(got.float(), wanted.float(), rtol=0, atol=2e-2)
        assert all(map(torch.equal, ours, left))


class TestSeeds:
    """With the default sampler: what is promised of every patched method."""

    def test_it_is_best_of_m(self, network):
        model = patch(small_lsrs())
        got, _ = call(model, network, 5, st=2, ed=4, m_k=6, top_k=30)
        search = BestOfM(PublishedScorer(network), m=6, first_scale=2, last_scale=3)
        wanted = generate(small_var(), LABELS, search=search, seeds=5, top_k=30).images
        assert torch.equal(got, wanted)
        got, _ = call(model, network, 5, m_k=6, top_k_lsrs=3, temperature_lsrs=0.5)
        search = BestOfM(PublishedScorer(network), m=6, pick=3, temperature=0.5)
        assert torch.equal(got, generate(small_var(), LABELS, search=search, seeds=5).images)

    def test_our_own_scorer(self):
        model, scorer = patch(small_lsrs()), small_scorer()
        got, _ = call(model, scorer, 5)
        assert torch.equal(got, generate(small_var(), LABELS, search=BestOfM(scorer, m=4), seeds=5).images)
        wrapped = PublishedScorer(lambda x, classes, scales: scorer(classes, x.unsqueeze(1), scales.unsqueeze(1)))
        assert torch.equal(call(model, wrapped, 5)[0], got)

    @pytest.mark.parametrize("options", [{}, {"rand_list": [1, 3], "m_k": 3, "top_k_lsrs": 2}], ids=str)
    def test_an_image_depends_on_its_own_seed_alone(self, options, network):
        model, seeds = patch(small_lsrs()), image_seeds(4, 3)
        whole, left = call(model, network, seeds, **options)
        for places in ([2, 0], [1]):
            part, _ = call(model, network, seeds[places], len(places), LABELS[places], **options)
            assert torch.allclose(part, whole[places], rtol=0, atol=1e-4)
        torch.manual_seed(99)
        assert all(map(torch.equal, left, random_states(model)))

    def test_random_maps_are_uniform(self, network):
        """Of 64 tokens each is drawn as often as any, by a chi-square test that fails by chance below 1e-6."""
        model, seen = patch(small_lsrs()), []

        def noting(x, class_labels, stage_label):
            return network(x, class_labels, stage_label)

        from varkern.draws import MultinomialDraws, PhiloxDraws

        for draws in (PhiloxDraws(image_seeds(0, 50)), MultinomialDraws(None, 50, torch.device("cpu"))):
            torch.manual_seed(0)
            tokens = draws.uniform_tokens(2, 8, 36, 64)
            assert tokens.shape == (50, 8, 36) and tokens.dtype == torch.int64
            counts = torch.bincount(tokens.flatten(), minlength=64).double()
            expected = tokens.numel() / 64
            assert counts.shape == (64,) and ((counts - expected) ** 2 / expected).sum() < 138  # 63 degrees of freedom
            seen.append(tokens)
        assert torch.equal(PhiloxDraws(image_seeds(0, 50)).uniform_tokens(2, 3, 36, 64), seen[0][:, :3])
        assert not torch.equal(call(model, noting, rand_list=[3])[0], call(model, noting)[0])

    def test_it_never_waits_for_the_device(self, network, monkeypatch):
        model, network = patch(small_lsrs()), copy.deepcopy(network)
        where = far(model, model.vae_proxy[0], network)
        labels = LABELS.to(where)
        given = {"B": 3, "label_B": labels, "g_seed": labels, "discriminator": network, "m_k": 3, "top_k_lsrs": 2}
        if where.type == "cuda":
            getattr(model, METHOD)(**given, rand_list=[2])
        with no_waiting(monkeypatch):
            assert getattr(model, METHOD)(**given, rand_list=[2]).shape == (3, 3, 12, 12)

    def test_on_the_device_with_its_kernels(self, network, device, quick_backend):
        model = small_lsrs()
        wanted, _ = call(patch(model), network, m_k=2, top_k_lsrs=2)
        model, network = on(model, device), copy.deepcopy(network).to(device)
        with use_backend(quick_backend):
            got, _ = call(model, network, m_k=2, top_k_lsrs=2, label_B=LABELS.to(device))
        assert torch.allclose(got.cpu(), wanted, rtol=0, atol=1e-3)


class TestGraphs:
    @pytest.fixture
    def captures(self, monkeypatch):
        """Counts captures, which on a CPU are stand-ins."""
        from tests.test_graphs import again
        from varkern import graphs

        found = []
        monkeypatch.setattr(graphs, "capture_cuda", lambda *given: found.append(given) or again(*given))
        monkeypatch.setattr(graphs.GenerationGraphs, "hindrance", lambda self, device: None)
        return found

    def test_each_set_of_arguments_is_captured_once(self, network, captures):
        other, model = map_network(), small_lsrs()
        other.out_proj.weight.mul_(-1)
        calls = [(network, {}), (other, {}), (network, {"m_k": 2}), (network, {"rand_list": [1]})]
        patch(model)
        wanted = [call(model, net, 3, **options)[0] for net, options in calls]
        patch(model, cuda_graph=True)
        for _ in range(2):
            for (net, options), images in zip(calls, wanted, strict=True):
                assert torch.equal(call(model, net, 3, **options)[0], images)
        assert len(captures) == len(calls)
        assert torch.equal(call(model, network, 4)[0], call(patch(small_lsrs()), network, 4)[0])
        assert len(captures) == len(calls)


class TestNoTrace:
    def test_patch_and_unpatch(self, network):
        model = small_lsrs()
        plain, lsrs = model.autoregressive_infer_cfg(3, LABELS, 0), call(model, network)[0]
        before, order, text = dict(vars(model)), list(vars(model)), repr(model)
        signatures = {name: inspect.signature(getattr(model, name)) for name in BOTH}
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        assert patch(patch(model), BestOfM(PublishedScorer(network), m=2)) is model
        assert set(vars(model)) - set(before) == BOTH | {"__getstate__"}
        assert repr(model) == text and b"PatchedMethod" not in pickle.dumps(model)
        for name in BOTH:
            method = getattr(model, name)
            assert inspect.signature(method) == signatures[name]
            assert method.__name__ == name and method.__doc__ == getattr(LSRSVAR, name).__doc__
        assert "as called" in repr(getattr(model, METHOD)) and "m=2" in repr(model.autoregressive_infer_cfg)
        searched = call(model, network)[0]
        assert not torch.equal(searched, lsrs)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(call(twin, network)[0], lsrs)
            assert torch.equal(twin.autoregressive_infer_cfg(3, LABELS, 0), plain)
        assert torch.equal(call(model, network)[0], searched)
        assert unpatch(model) is model
        assert list(vars(model)) == order and all(vars(model)[name] is value for name, value in before.items())
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in weights.items())
        assert torch.equal(call(model, network)[0], lsrs)
        assert torch.equal(model.autoregressive_infer_cfg(3, LABELS, 0), plain)

    def test_the_plain_method_is_served_as_of_any_model(self):
        model = small_lsrs()
        plain = model.autoregressive_infer_cfg(3, LABELS, 0)
        with patched(model, **MULTINOMIAL):
            assert torch.equal(model.autoregressive_infer_cfg(3, LABELS, 0), plain)

    def test_patched_restores_what_was_there(self, network):
        model = small_lsrs()
        with pytest.raises(RuntimeError, match="stop"), patched(model):
            raise RuntimeError("stop")
        assert not BOTH & set(vars(model))
        outer = vars(patch(model))[METHOD]
        with patched(model):
            assert vars(model)[METHOD] is not outer
        assert vars(model)[METHOD] is outer
        unpatch(model)

        def mine(*args, **kwargs):
            return getattr(LSRSVAR, METHOD)(model, *args, **kwargs)

        mine.__signature__ = inspect.signature(getattr(model, METHOD))
        setattr(model, METHOD, mine)
        with patched(model):
            assert getattr(model, METHOD) is mine  # not the published method, so it is left alone
        assert getattr(unpatch(patch(patch(model))), METHOD) is mine

    def test_an_exception_leaves_the_model_usable(self, network):
        model, calls = small_lsrs(), []
        before = call(model, network)[0]

        def failing(maps, classes, scales):
            calls.append(1)
            if len(calls) in (1, 4):
                raise RuntimeError("the scorer failed")
            return network(maps, classes, scales)

        for sampler in ("philox", "multinomial"):
            calls.clear()
            patch(model, sampler=sampler)
            for _ in range(2):
                with pytest.raises(RuntimeError, match="the scorer failed"):
                    call(model, failing)
                assert caches_closed(model)
            assert torch.equal(call(model, failing)[0], call(model, network)[0])
        assert torch.equal(call(unpatch(model), network)[0], before)

    def test_a_method_of_other_arguments_is_left_alone(self):
        """A fork's method of that name which does not take all published arguments is none of ours."""

        class Other(VAR):
            def autoregressive_infer_cfg_lsrs(self, B, label_B, discriminator, g_seed=None):
                return "theirs"

        model = small_var()
        model.__class__ = Other
        patch(model)
        assert set(vars(model)) & BOTH == {"autoregressive_infer_cfg"}
        assert getattr(model, METHOD)(1, 2, None) == "theirs"

    def test_a_model_without_the_method(self):
        model = patch(small_var())
        assert set(vars(model)) & BOTH == {"autoregressive_infer_cfg"} and not hasattr(model, METHOD)


WRONG = {
    "no discriminator": ({"discriminator": None}, TypeError, "discriminator must be a network .*, got None"),
    "a class": ({"discriminator": LSRSVAR}, TypeError, "discriminator must be a network .*, got <class"),
    "no candidates": ({"m_k": 0}, ValueError, "m_k must be an int >= 1, got 0"),
    "fewer": ({"m_k": -4}, ValueError, "m_k must be an int >= 1, got -4"),
    "m_k by scale": ({"m_k": (1, 2)}, ValueError, r"m_k must be an int >= 1, got \(1, 2\)"),
    "st": ({"st": 1.5}, TypeError, "st must be an int, a scale counted from 0, got 1.5"),
    "ed": ({"ed": None}, TypeError, "ed must be an int, a scale counted from 0, got None"),
    "no pick": ({"top_k_lsrs": 0}, ValueError, "top_k_lsrs must be an int >= 1, got 0"),
    "temperature": ({"top_k_lsrs": 2, "temperature_lsrs": 0}, ValueError, "temperature_lsrs must be .* > 0, got 0"),
    "rand_list": ({"rand_list": 3}, TypeError, "rand_list must be None or a list of scales, .* got 3"),
    "in rand_list": ({"rand_list": ["1"]}, TypeError, r"rand_list must be None or a list of scales, .* got \['1'\]"),
    "label": ({"label_B": -1}, ValueError, rf"label .* in 0..{NUM_CLASSES - 1}, the scorer's classes, got 7"),
    "cfg": ({"cfg": float("nan")}, ValueError, "cfg must be a finite number"),
    "batch": ({"B": -1}, ValueError, r"batch size \(B\) must be an int >= 0, got -1"),
}


@pytest.mark.parametrize("sampler", ["philox", "multinomial"])
@pytest.mark.parametrize("options, error, message", WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_refused_before_any_work(options, error, message, sampler, network):
    model = patch(small_lsrs(), sampler=sampler)
    given = {"B": 3, "label_B": LABELS, "g_seed": 0, "discriminator": network} | options
    with idle(model), pytest.raises(error, match=message):
        getattr(model, METHOD)(**given)


def test_wrapped_networks_are_found_again_and_few_are_kept(network):
    search, others = CalledSearch(5, "philox"), [map_network() for _ in range(WRAPPED)]
    first = search.scorer(network)
    assert search.scorer(network) is first
    for other in others[1:]:
        search.scorer(other)
    assert search.scorer(network) is first
    search.scorer(others[0])
    assert len(search.wrapped) == WRAPPED and search.scorer(network) is not first
