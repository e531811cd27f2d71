"""A search inside a model's own loop: what a fork does beyond the published method is kept, or the patch says so."""

import functools
import importlib.util
import sys

import pytest
import torch
from torch import nn

import varkern
from tests.helpers import NUM_CLASSES, caches_closed, idle, small_scorer, small_var
from tests.standins import forks
from tests.standins.cases import CASES
from tests.standins.forks import ArgmaxVAR, BrightVAR, ForkedVAR, fork, in_a_script
from varkern import BestOfM, DensitySearch, OwnLoopError, UnsupportedModelError, explain_patch, patch, patched, unpatch
from varkern.models import VAR

LABELS = torch.tensor([3, 0, 6])
SETTINGS = {"top_k": 20, "top_p": 0.9}
MULTINOMIAL = {"sampler": "multinomial"}


class Wide(nn.Module):
    """A block that wants one more argument than the published one."""

    def __init__(self, block):
        super().__init__()
        self.block, self.attn = block, block.attn

    def forward(self, x, cond_BD, attn_bias, strength):
        return self.block(x=strength * x, cond_BD=cond_BD, attn_bias=attn_bias)


def masked():
    model = fork(ForkedVAR)
    model.mask = torch.arange(model.V) % 3 == 0
    return model, {}


def wide():
    model = fork(ForkedVAR)
    model.extra, model.blocks = {"strength": 0.9}, nn.ModuleList(map(Wide, model.blocks))
    return model, {}


def swapped_sampler():
    model = small_var()
    method = VAR.autoregressive_infer_cfg

    def warm(self, *args, **kwargs):
        return method(self, *args, **{**kwargs, "cfg": 0.3})

    model.autoregressive_infer_cfg = functools.partial(warm, model)
    return model, {}


FORKS = {
    "another guidance": lambda: (fork(ForkedVAR), {"flat_guidance": True}),
    "a mask as an attribute": masked,
    "every scale's image": lambda: (fork(ForkedVAR), {"every_scale": True}),
    "blocks with an argument more": wide,
    "halves embedded apart": lambda: (fork(ForkedVAR), {"halves_apart": True}),
    "a subclass that changes the images": lambda: (fork(BrightVAR), {}),
    "a method set on the instance": swapped_sampler,
    "a search of its own": lambda: (fork(ForkedVAR), {"enable_var_scaling": True}),
}


def of(images):
    return images[-1] if isinstance(images, list) else images


@pytest.fixture(params=FORKS.values(), ids=FORKS)
def forked(request):
    """A model, and how to call it."""
    model, options = request.param()
    return model, lambda seed=5: model.autoregressive_infer_cfg(3, LABELS, g_seed=seed, **SETTINGS, **options)


class TestForks:
    def test_alone_it_gives_the_images_of_the_unpatched_model(self, forked, request):
        model, call = forked
        own_search = "a search of its own" in request.node.name  # which any search of ours replaces
        before = call()
        assert explain_patch(model).loop == "own"
        with patched(model, **MULTINOMIAL):
            inside = call()
        assert type(inside) is type(before) and torch.equal(of(inside), of(before))
        if not own_search:
            with patched(model, BestOfM(small_scorer(), m=1), **MULTINOMIAL):
                assert torch.equal(of(call()), of(before))
        assert torch.equal(of(call()), of(before))

    def test_a_search_chooses_inside_it(self, forked, recwarn):
        model, call = forked
        seen = []

        class Recording(BestOfM):
            def choose(self, candidates):
                seen.append((candidates.scale, tuple(candidates.tokens.shape), candidates.labels.tolist()))
                return super().choose(candidates)

        with patched(model, Recording(small_scorer(), m=4)):
            first, again, other = call(), call(), call(6)
        shapes = [(scale, (3, 4, side * side), LABELS.tolist()) for scale, side in enumerate(model.patch_nums)]
        assert seen == shapes[1:] * 3
        assert torch.equal(of(first), of(again)) and not torch.equal(of(first), of(other))
        with patched(model):
            assert not torch.equal(of(call()), of(first))
        assert caches_closed(model) and "autoregressive_infer_cfg" in {**vars(model), **vars(type(model))}

    def test_an_image_depends_on_its_own_seed(self, forked):
        model, call = forked
        with patched(model, DensitySearch(n=5, min_distance=0)):
            one, other = (of(call(torch.tensor([7, 8, last]))) for last in (9, 10))
        assert torch.allclose(one[:2], other[:2], atol=1e-5) and not torch.allclose(one[2], other[2], atol=1e-2)

    def test_it_leaves_no_trace(self, forked):
        model, call = forked
        before, quantizer = dict(vars(model)), dict(vars(model.vae_quant_proxy[0]))
        hooks = len(model.class_emb._forward_pre_hooks)
        with pytest.raises(RuntimeError, match="stop"), patched(model, BestOfM(failing, m=2)):
            call()
        assert vars(model) == before and vars(model.vae_quant_proxy[0]) == quantizer
        assert len(model.class_emb._forward_pre_hooks) == hooks and caches_closed(model)
        assert forks.sample_with_top_k_top_p_ is forks.sampled
        assert unpatch(patch(model)) is model and vars(model) == before


def mean_square(labels, features, scale):
    return features.square().mean((2, 3, 4))


def failing(labels, features, scale):
    raise RuntimeError("stop")


class TestTheLoopsAgree:
    """On a published method the own-loop way draws the images of the fused one."""

    @pytest.mark.parametrize("name", CASES)
    @pytest.mark.parametrize("m", [1, 4])
    def test_the_same_images(self, name, m):
        case = CASES[name]
        model = case.build()
        search = BestOfM(mean_square, m=m, first_scale=0)
        found = {}
        for loop in ("fused", "own"):
            with patched(model, search, loop=loop):
                found[loop] = case.images(case.call(model, 0)).float()
        difference = (found["fused"] - found["own"]).abs()
        assert difference.max() <= (1 if difference.max() >= 1 else 2e-5)

    @pytest.mark.parametrize("name", CASES)
    def test_alone_bit_for_bit(self, name):
        case = CASES[name]
        model = case.build()
        plain = case.images(case.call(model, 0))
        with patched(model, loop="own", **MULTINOMIAL):
            assert torch.equal(case.images(case.call(model, 0)), plain)

    def test_density_too(self):
        model, search = small_var(), DensitySearch(n=6, scales=(1, 3))
        with patched(model, search):
            fused = model.autoregressive_infer_cfg(3, LABELS, 5)
        with patched(model, search, loop="own"):
            assert torch.allclose(model.autoregressive_infer_cfg(3, LABELS, 5), fused, atol=2e-5)


class TestWhatCannotBeSearched:
    def test_another_way_to_draw(self):
        model = fork(ArgmaxVAR)
        with (
            patched(model, BestOfM(small_scorer(), m=2)),
            pytest.raises(OwnLoopError, match="draw the tokens of scale 1"),
        ):
            model.autoregressive_infer_cfg(3, LABELS, 0)
        with patched(model), pytest.raises(OwnLoopError, match=r"drew no token with torch\.multinomial"):
            model.autoregressive_infer_cfg(3, LABELS, 0)
        assert caches_closed(model)

    def test_smoothing(self):
        model = patch(fork(ForkedVAR), BestOfM(small_scorer(), m=2))
        with idle(model), pytest.raises(ValueError, match=r"more_smooth must be False .* got True"):
            model.autoregressive_infer_cfg(3, LABELS, 0, more_smooth=True)

    def test_labels_that_the_scorer_does_not_know(self):
        model = patch(fork(ForkedVAR), BestOfM(small_scorer(), m=2))
        with pytest.raises(ValueError, match="the scorer's classes, got 7"):
            model.autoregressive_infer_cfg(3, torch.tensor([1, NUM_CLASSES, 2]), 0)

    @pytest.mark.parametrize(
        "options, error, message",
        [
            ({"loop": "mine"}, ValueError, "loop must be one of 'auto', 'fused', 'own', got 'mine'"),
            ({"method": "paint"}, UnsupportedModelError, "ForkedVAR has no method paint"),
            (
                {"method": "car_inference", "loop": "fused"},
                ValueError,
                "loop='fused' replaces autoregressive_infer_cfg",
            ),
            (
                {"cuda_graph": True},
                ValueError,
                "cuda_graph=True needs loop='fused', but .* is not the published method",
            ),
        ],
        ids=["loop", "method", "fused method", "graph"],
    )
    def test_bad_arguments_leave_the_model_alone(self, options, error, message):
        model = fork(ForkedVAR)
        before = dict(vars(model))
        with pytest.raises(error, match=message):
            patch(model, **options)
        assert vars(model) == before

    def test_seeds_of_another_number(self):
        model = patch(fork(ForkedVAR))
        for seeds in (torch.tensor([1, 2]), torch.zeros(3)):
            with pytest.raises(ValueError, match=r"as a tensor must be int64 of shape \[3\], got"):
                model.autoregressive_infer_cfg(3, LABELS, seeds)

    @pytest.mark.parametrize("search", [None, BestOfM(small_scorer(), m=2)], ids=["none", "best"])
    def test_image_seeds_with_the_models_own_generator(self, search):
        model = patch(fork(ForkedVAR), search, **MULTINOMIAL)
        with idle(model), pytest.raises(ValueError, match="must be an int or None for sampler 'multinomial'"):
            model.autoregressive_infer_cfg(3, LABELS, torch.tensor([1, 2, 3]))

    @pytest.mark.parametrize("name", ["FlexVAR", "Infinity"])
    def test_a_last_scale_that_is_drawn_in_another_way(self, name, monkeypatch):
        """These loops do not say when a scale ends, so what was not drawn at the end is found after them."""
        case = CASES[name]
        model, module = case.build(), sys.modules[type(case.build()).__module__]
        calls = []

        def drawing(logits, *args, **kwargs):
            calls.append(1)
            return logits.argmax(-1) if len(calls) == 5 else sampled(logits, *args, **kwargs)

        sampled = module.sampled
        monkeypatch.setattr(module, "sampled", drawing)
        with patched(model, BestOfM(mean_square, m=2, first_scale=3), loop="own"):
            with pytest.raises(OwnLoopError, match="draw the tokens of scale 4"):
                case.call(model, 0)
        assert len(calls) == 5

    def test_generate_refuses_another_loop(self):
        model = fork(ForkedVAR)
        for function in (varkern.generate, lambda model, labels, **more: varkern.check(model, labels=labels, **more)):
            with idle(model), pytest.raises(UnsupportedModelError, match=r"use varkern\.patch.* or pass loop='fused'"):
                function(model, LABELS, seeds=0)
            function(model, LABELS, seeds=0, loop="fused")


class TestItsOwnSearch:
    def test_it_is_kept_without_another(self):
        model = fork(ForkedVAR)
        call = functools.partial(model.autoregressive_infer_cfg, 3, LABELS, enable_var_scaling=True, g_seed=0)
        plain = call()
        with patched(model, **MULTINOMIAL):
            assert torch.equal(call(), plain)
        with patched(model):
            one, more = call(own_samples=1), call(own_samples=8)
        assert not torch.equal(one, more)  # its draws differ, though all come from the images' seeds

    def test_it_is_replaced_by_ours_with_one_warning(self):
        model = patch(fork(ForkedVAR), BestOfM(small_scorer(), m=4))
        with pytest.warns(UserWarning, match="enable_var_scaling=False: the search of varkern.patch") as caught:
            both = [model.autoregressive_infer_cfg(3, LABELS, 0, enable_var_scaling=True) for _ in range(2)]
        assert len(caught) == 1
        assert torch.equal(both[0], model.autoregressive_infer_cfg(3, LABELS, 0)) and torch.equal(*both)


class TestOtherEntryPoints:
    def test_another_method(self):
        model = fork(ForkedVAR)
        plain, name = model.car_inference(LABELS, 1), "car_inference"
        assert explain_patch(model, name).reason == "car_inference is not the family's autoregressive_infer_cfg"
        with patched(model, method=name, **MULTINOMIAL):
            assert torch.equal(model.car_inference(LABELS, 1), plain)
        with patched(model, BestOfM(small_scorer(), m=8), method=name) as inside:
            assert "car_inference" in vars(inside) and "autoregressive_infer_cfg" not in vars(inside)
            assert not torch.equal(model.car_inference(LABELS, 1), plain)
        assert "car_inference" not in vars(model)

    @torch.no_grad()
    def test_a_scripts_loop(self):
        model = small_var()
        plain = in_a_script(model, LABELS, 0)
        with varkern.searching(model, **MULTINOMIAL):
            assert torch.equal(in_a_script(model, LABELS, 0), plain)
        scores = []

        def scorer(labels, features, scale):
            scores.append(features.mean((2, 3, 4)))
            return scores[-1]

        with varkern.searching(model, BestOfM(scorer, m=4), seeds=0):
            first = in_a_script(model, LABELS, 0)
            in_a_script(model, LABELS, 0)  # another generation in the same block
        assert len(scores) == 8 and all(torch.equal(*pair) for pair in zip(scores[:4], scores[4:], strict=True))
        assert not torch.equal(first, plain) and torch.equal(in_a_script(model, LABELS, 0), plain)
        with pytest.raises(OwnLoopError, match="drew no token"), varkern.searching(model, seeds=0):
            pass


SOURCE = '''
import torch
from tests.standins.sampling import sampled
from varkern.models import VAR

def sample_with_top_k_top_p_(logits, top_k, top_p, rng):
    """Draws."""
    return sampled(logits, top_k, top_p, rng)

class Fork(VAR):
    @torch.no_grad()
    def autoregressive_infer_cfg(self, B, label_B, g_seed=None{default}):
        """Generates."""
        return sample_with_top_k_top_p_({body})
'''


def module_of(tmp_path, name, source):
    path = tmp_path / f"{name}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class TestFingerprints:
    def test_what_changes_one(self, tmp_path):
        text = SOURCE.format(default="", body="B, 1, 2, None")
        same = text.replace('"""Generates."""', "# says nothing").replace("B, label_B,", "B: int, label_B: 'int',")
        made = {
            "published": text,
            "reformatted": same,
            "constant": text.replace("1, 2", "1, 3"),
            "default": SOURCE.format(default=", cfg=2", body="B, 1, 2, None"),
        }
        found = {}
        for name, source in made.items():
            kind = module_of(tmp_path, f"fork_{name}", source).Fork
            code = varkern.fingerprints.plain(kind.autoregressive_infer_cfg).__code__
            found[name] = varkern.fingerprints.fingerprint(code)
        assert found["published"] == found["reformatted"] and len(set(found.values())) == 3

    def test_a_sampler_of_the_module_that_was_replaced(self, tmp_path, monkeypatch):
        module = module_of(tmp_path, "fork_sampler", SOURCE.format(default="", body="B, 1, 2, None"))
        known = [module.Fork.autoregressive_infer_cfg, module.sample_with_top_k_top_p_]
        for function in known:
            code = varkern.fingerprints.plain(function).__code__
            monkeypatch.setitem(varkern.fingerprints.KNOWN, varkern.fingerprints.fingerprint(code), "here")
        model = fork(module.Fork)
        assert explain_patch(model).loop == "fused"
        monkeypatch.setattr(module, "sample_with_top_k_top_p_", lambda *args: forks.sampled(*args))
        assert explain_patch(model).reason.startswith("sample_with_top_k_top_p_, which fork_sampler.Fork.auto")

    def test_a_quantizers_step_of_the_users_own(self):
        model = small_var()
        step = model.vae_quant_proxy[0].get_next_autoregressive_input
        model.vae_quant_proxy[0].get_next_autoregressive_input = lambda *args: step(*args)
        assert "is not the published one" in explain_patch(model).reason

    def test_a_decorator_is_part_of_the_method(self):
        class Doubled(VAR):
            autoregressive_infer_cfg = functools.wraps(VAR.autoregressive_infer_cfg)(
                lambda self, *args, **kwargs: 2 * VAR.autoregressive_infer_cfg(self, *args, **kwargs)
            )

        model = fork(Doubled)
        assert explain_patch(model).loop == "own"
        plain = model.autoregressive_infer_cfg(3, LABELS, 5)
        with patched(model, **MULTINOMIAL):
            assert torch.equal(model.autoregressive_infer_cfg(3, LABELS, 5), plain)

    def test_source_that_is_not_to_be_had(self):
        scope = {"VAR": VAR}
        exec(
            "def method(self, *args, **kwargs):\n    return VAR.autoregressive_infer_cfg(self, *args, **kwargs)", scope
        )
        model = fork(type("Sourceless", (VAR,), {"autoregressive_infer_cfg": scope["method"]}))
        assert explain_patch(model).loop == "own"

    def test_ours_is_known_patched_or_not(self):
        model = small_var()
        for _ in range(2):
            assert explain_patch(model) == ("VAR", "autoregressive_infer_cfg", "fused", explain_patch(model).reason)
            patch(model, BestOfM(small_scorer(), m=2))

    @pytest.mark.parametrize("name", ["module", "_orig_mod"])
    def test_a_wrapper_is_named(self, name):
        class Wrapper(nn.Module):
            pass

        wrapper = Wrapper()
        setattr(wrapper, name, small_var())
        with pytest.raises(UnsupportedModelError, match=f"Wrapper wraps a model of a known family: pass model.{name}"):
            patch(wrapper)
