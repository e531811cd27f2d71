"""What ``patch`` changes and what it leaves alone, and that a model is as before once the patch is gone."""

import copy
import functools
import inspect
import io
import pickle
import pickletools
from types import SimpleNamespace

import pytest
import torch

from tests.families.test_var import stub
from tests.helpers import caches_closed, forked, idle, on, small_scorer, small_var
from tests.standins.wrappers import CopiesItself
from varkern import BestOfM, UnsupportedModelError, generate, image_seeds, patch, patched, unpatch
from varkern.models import VAR, VQVAE
from varkern.ops import use_backend

LABELS = torch.tensor([3, 0])
MULTINOMIAL = {"sampler": "multinomial"}


def surface(model):
    """All that another part of a script can see of a model."""
    written = io.BytesIO()
    torch.save(model.state_dict(), written)
    return {
        "attributes": {name: id(value) for name, value in vars(model).items()},
        "order": list(vars(model)),
        "state": written.getvalue(),
        "repr": repr(model),
        # Without the bytes of tensors, which name storages by their address and so differ from dump to dump.
        "pickle": [(op.name, arg) for op, arg, _ in pickletools.genops(pickle.dumps(model)) if type(arg) is not bytes],
        "signature": inspect.signature(model.autoregressive_infer_cfg),
        "training": [m.training for m in model.modules()],
    }


def best_of(m=3):
    return BestOfM(lambda labels, features, scale: features.mean((2, 3, 4)), m=m)


@pytest.mark.parametrize("build", [small_var, forked], ids=["VAR", "subclass"])
def test_patch_patch_unpatch_leaves_no_trace(build):
    model = build()
    images = model.autoregressive_infer_cfg(2, 1, 0)  # reseeds the model's generator, which is part of its pickle
    before = surface(model)
    assert patch(model) is model
    assert patch(model, best_of()) is model
    assert not torch.equal(model.autoregressive_infer_cfg(2, 1, 0), images)
    assert unpatch(model) is model
    assert surface(model) == before
    assert torch.equal(model.autoregressive_infer_cfg(2, 1, 0), images)
    assert surface(unpatch(small_var()))["repr"] == surface(small_var())["repr"]  # nothing to take back


def test_one_attribute_changes():
    model = small_var()
    before = surface(model)
    patch(model, best_of())
    changed = set(vars(model)) - set(before["order"])
    assert changed == {"autoregressive_infer_cfg", "__getstate__"}  # the second keeps the first out of pickles
    assert all(id(vars(model)[name]) == value for name, value in before["attributes"].items())
    for what in ("state", "repr", "signature", "training", "pickle"):
        assert surface(model)[what] == before[what], what
    method = model.autoregressive_infer_cfg
    assert method.__name__ == "autoregressive_infer_cfg"
    assert method.__doc__ == VAR.autoregressive_infer_cfg.__doc__
    assert "best" in repr(method) and "philox" in repr(method)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
    ids=["deepcopy", "pickle"],
)
@pytest.mark.parametrize("build", [small_var, forked], ids=["VAR", "subclass"])
def test_a_copy_is_unpatched_and_works_alone(build, duplicate):
    model = build()
    plain = model.autoregressive_infer_cfg(2, LABELS, 0)
    patch(model, best_of())
    twin, ours = duplicate(model), model.autoregressive_infer_cfg(2, LABELS, 0)
    assert not torch.equal(ours, plain)
    assert torch.equal(twin.autoregressive_infer_cfg(2, LABELS, 0), plain)
    twin.head.weight.zero_()
    assert torch.equal(model.autoregressive_infer_cfg(2, LABELS, 0), ours)
    patch(twin, best_of())
    assert not torch.equal(twin.autoregressive_infer_cfg(2, LABELS, 0), ours)
    unpatch(model)
    assert torch.equal(model.autoregressive_infer_cfg(2, LABELS, 0), plain)


def test_a_class_that_copies_itself():
    """Its copies take the whole ``__dict__``; what stands there for the patch goes at the first use."""
    model = small_var()
    model.__class__ = type("Copying", (CopiesItself, VAR), {})
    plain, before = model.autoregressive_infer_cfg(2, LABELS, 0), list(vars(model))
    searched = patch(model, best_of()).autoregressive_infer_cfg(2, LABELS, 0)
    called, taken_back, again, copied = (copy.deepcopy(model) for _ in range(4))
    for twin in (called, unpatch(taken_back), copy.deepcopy(copied)):
        assert torch.equal(twin.autoregressive_infer_cfg(2, LABELS, 0), plain)
        twin.head.weight.zero_()
        assert list(vars(twin)) == before
    assert torch.equal(patch(again, best_of()).autoregressive_infer_cfg(2, LABELS, 0), searched)
    assert torch.equal(unpatch(again).autoregressive_infer_cfg(2, LABELS, 0), plain) and list(vars(again)) == before
    assert torch.equal(model.autoregressive_infer_cfg(2, LABELS, 0), searched)


def test_a_users_own_attribute_is_in_every_copy():
    model = small_var()
    model.autoregressive_infer_cfg = functools.partial(VAR.autoregressive_infer_cfg, model)
    before = list(vars(model))
    plain = model.autoregressive_infer_cfg(2, LABELS, 0)
    patch(model, best_of())
    for duplicate in (copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))):
        twin = duplicate(model)
        assert list(vars(twin)) == before and type(twin.autoregressive_infer_cfg) is functools.partial
        assert torch.equal(twin.autoregressive_infer_cfg(2, LABELS, 0), plain)
        assert twin.autoregressive_infer_cfg.args[0] is (model if duplicate is copy.copy else twin)


def test_a_pickle_made_while_patched_needs_no_varkern_patch():
    model = small_var()
    plain = pickle.loads(pickle.dumps(model))
    twin = pickle.loads(pickle.dumps(patch(model, best_of())))
    assert repr(twin) == repr(plain)
    assert all(torch.equal(a, b) for a, b in zip(twin.state_dict().values(), plain.state_dict().values(), strict=True))
    assert b"PatchedMethod" not in pickle.dumps(model)


def test_state_dict_loads_while_patched():
    model, other = small_var(), small_var(seed=7, vae=small_var().vae_proxy[0])
    plain = other.autoregressive_infer_cfg(2, LABELS, 0)
    with patched(model, **MULTINOMIAL):
        model.load_state_dict(other.state_dict(), strict=True)
        assert torch.equal(model.autoregressive_infer_cfg(2, LABELS, 0), plain)


def test_the_users_own_attribute_comes_back():
    model = small_var()
    calls = []

    def mine(B, label_B, g_seed=None, cfg=1.5):
        calls.append(B)
        return VAR.autoregressive_infer_cfg(model, B, label_B, g_seed, cfg)

    model.autoregressive_infer_cfg = mine
    patch(patch(model), best_of())
    assert inspect.signature(model.autoregressive_infer_cfg) == inspect.signature(mine)
    assert model.autoregressive_infer_cfg(2, LABELS, 0).shape[0] == 2 and calls == [2]
    unpatch(model)
    assert model.autoregressive_infer_cfg is mine
    model.autoregressive_infer_cfg(2, LABELS, 0)
    assert calls == [2, 2]


def test_patched_restores_what_was_there():
    model = small_var()
    plain = model.autoregressive_infer_cfg(2, LABELS, 0)
    with patched(model) as inside:
        assert inside is model
        assert not torch.equal(model.autoregressive_infer_cfg(2, LABELS, 0), plain)
    assert "autoregressive_infer_cfg" not in vars(model)
    patch(model, best_of())
    outer = vars(model)["autoregressive_infer_cfg"]
    with pytest.raises(RuntimeError, match="stop"), patched(model):
        with patched(model, best_of(5)):
            assert "m=5" in repr(model.autoregressive_infer_cfg)
        assert "search=None" in repr(model.autoregressive_infer_cfg)
        raise RuntimeError("stop")
    assert vars(model)["autoregressive_infer_cfg"] is outer
    with patched(model):
        unpatch(model)
    assert vars(model)["autoregressive_infer_cfg"] is outer


def failing(after):
    """A scorer that gives up at its ``after``-th call."""
    calls = []

    def scorer(labels, features, scale):
        calls.append(scale)
        if len(calls) == after:
            raise RuntimeError("the scorer failed")
        return features.mean((2, 3, 4))

    return scorer


@pytest.mark.parametrize("after", [1, 4])
@pytest.mark.parametrize("sampler", ["philox", "multinomial"])
def test_an_exception_in_the_scorer_leaves_the_model_usable(after, sampler):
    model = small_var()
    before = model.autoregressive_infer_cfg(2, LABELS, 0)
    patch(model, BestOfM(failing(after), m=2), sampler=sampler)
    with pytest.raises(RuntimeError, match="the scorer failed"):
        model.autoregressive_infer_cfg(2, LABELS, 0)
    assert caches_closed(model)
    images = model.autoregressive_infer_cfg(2, LABELS, 0)  # the scorer has recovered
    assert torch.equal(model.autoregressive_infer_cfg(2, LABELS, 0), images)
    assert torch.equal(unpatch(model).autoregressive_infer_cfg(2, LABELS, 0), before)


def test_an_exception_in_a_block_or_the_decoder_closes_the_caches():
    model = small_var()
    before = model.autoregressive_infer_cfg(2, LABELS, 0)
    for module in (model.blocks[1], model.vae_proxy[0].decoder, model.head):
        handle = module.register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt), patched(model):
            model.autoregressive_infer_cfg(2, LABELS, 0)
        handle.remove()
        assert caches_closed(model)
    assert torch.equal(model.autoregressive_infer_cfg(2, LABELS, 0), before)


def test_two_models_do_not_influence_each_other():
    first, second = small_var(), small_var(seed=50)
    plain = [m.autoregressive_infer_cfg(2, LABELS, 0) for m in (first, second)]
    patch(first, best_of())
    searched = first.autoregressive_infer_cfg(2, LABELS, 0)
    assert torch.equal(second.autoregressive_infer_cfg(2, LABELS, 0), plain[1])
    patch(second, **MULTINOMIAL)
    for _ in range(2):
        assert torch.equal(first.autoregressive_infer_cfg(2, LABELS, 0), searched)
        assert torch.equal(second.autoregressive_infer_cfg(2, LABELS, 0), plain[1])
    unpatch(first)
    assert torch.equal(first.autoregressive_infer_cfg(2, LABELS, 0), plain[0])
    assert "autoregressive_infer_cfg" in vars(second)
    assert VAR.autoregressive_infer_cfg.__qualname__ == "VAR.autoregressive_infer_cfg"


def test_a_generation_inside_a_scorer_of_another_model():
    """Interleaved in the middle of a generation, two models still do not meet."""
    outer, inner = small_var(), small_var(seed=50)
    wanted = inner.autoregressive_infer_cfg(2, LABELS, 0)
    patch(inner, **MULTINOMIAL)

    def scorer(labels, features, scale):
        assert torch.equal(inner.autoregressive_infer_cfg(2, LABELS, 0), wanted)
        return features.mean((2, 3, 4))

    alone = patch(outer, best_of()).autoregressive_infer_cfg(2, LABELS, 0)
    assert torch.equal(patch(outer, BestOfM(scorer, m=3)).autoregressive_infer_cfg(2, LABELS, 0), alone)


@torch.no_grad()
def a_users_own_loop(model, labels):
    """Greedy generation without guidance, written against the model's parts alone: the images."""
    last, quantizer = len(model.patch_nums) - 1, model.vae_quant_proxy[0]
    cond = model.class_emb(labels)
    places = model.lvl_embed(model.lvl_1L) + model.pos_1LC
    x, end = cond.unsqueeze(1) + model.pos_start + places[:, :1], 1
    f_hat = torch.zeros(len(labels), model.Cvae, model.patch_nums[-1], model.patch_nums[-1], device=labels.device)
    for block in model.blocks:
        block.attn.kv_caching(True)
    for k, side in enumerate(model.patch_nums):
        for block in model.blocks:
            x = block(x=x, cond_BD=model.shared_ada_lin(cond), attn_bias=None)
        codes = quantizer.embedding(model.get_logits(x, cond).argmax(-1))
        codes = codes.transpose(1, 2).reshape(len(labels), -1, side, side)
        f_hat, pooled = quantizer.get_next_autoregressive_input(k, last + 1, f_hat, codes)
        if k != last:
            start, end = end, end + model.patch_nums[k + 1] ** 2
            x = model.word_embed(pooled.flatten(2).transpose(1, 2)) + places[:, start:end]
    for block in model.blocks:
        block.attn.kv_caching(False)
    return model.vae_proxy[0].fhat_to_img(f_hat)


@pytest.mark.parametrize("sampler", ["philox", "multinomial"])
def test_scripts_with_their_own_loop_work_while_patched(sampler):
    """A user's own loop between two generations: it gives what it gave before the patch, and they what they would."""
    model = small_var()
    own = a_users_own_loop(model, LABELS)
    assert torch.allclose((own + 1) / 2, model.autoregressive_infer_cfg(2, LABELS, 0, cfg=0, top_k=1), atol=1e-5)

    def generations(between):
        images = []
        for seed in (0, 1):
            images.append(model.autoregressive_infer_cfg(2, LABELS, seed))
            assert caches_closed(model)
            between()
        return images

    patch(model, best_of(), sampler=sampler)
    without = generations(lambda: None)
    inside = []
    interleaved = generations(lambda: inside.append(a_users_own_loop(model, LABELS)))
    assert len(inside) == 2 and all(torch.equal(images, own) for images in inside)
    assert all(torch.equal(*pair) for pair in zip(interleaved, without, strict=True))


def test_labels_and_seeds_on_any_device(device, quick_backend):
    """A patched model on a GPU, its kernels running, takes labels and seeds from the host and from the device."""
    model, seeds = on(small_var(), device), image_seeds(5, 2)
    search = BestOfM(small_scorer(), m=4, pick="resample")
    with use_backend(quick_backend):
        patch(model, search)
        wanted = model.autoregressive_infer_cfg(2, LABELS, 5, top_k=30)
        for labels in (LABELS, LABELS.to(device), LABELS.int()):
            for seed in (5, seeds, seeds.to(device)):
                assert torch.equal(model.autoregressive_infer_cfg(2, labels, seed, top_k=30), wanted)
        assert torch.equal(generate(unpatch(model), LABELS, seeds=seeds, search=search, top_k=30).images, wanted)
    assert wanted.device.type == device.type
    assert caches_closed(model)


def test_arguments_by_place_and_by_name():
    model = patch(small_var())
    by_name = model.autoregressive_infer_cfg(B=2, label_B=LABELS, g_seed=1, cfg=2.0, top_k=9, top_p=0.5)
    assert torch.equal(model.autoregressive_infer_cfg(2, LABELS, 1, 2.0, 9, 0.5), by_name)
    with pytest.raises(TypeError, match="missing a required argument: 'label_B'"):
        model.autoregressive_infer_cfg(2)
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        model.autoregressive_infer_cfg(2, 1, colour=3)


def test_a_forks_own_argument():
    model = patch(forked(), loop="fused")
    assert model.autoregressive_infer_cfg(2, 1, 0).shape[0] == 2  # left at its default it changes nothing
    with idle(model), pytest.raises(ValueError, match="a VAR model has no option 'echo'"):
        model.autoregressive_infer_cfg(2, 1, 0, echo=1)
    assert patch(model).autoregressive_infer_cfg(2, 1, 0, echo=1).shape[0] == 2  # its own loop takes it


def test_any_object_of_the_right_structure():
    model = stub()
    plain = model.autoregressive_infer_cfg(2, LABELS, 0)
    patch(model, **MULTINOMIAL)
    assert torch.equal(model.autoregressive_infer_cfg(2, LABELS, 0), plain)
    own = unpatch(model).autoregressive_infer_cfg
    assert own.__func__ is VAR.autoregressive_infer_cfg


def test_a_compiled_wrapper():
    model = small_var()
    # Compiles nothing here: the method runs the blocks, not the wrapper's forward.
    wrapper = torch.compile(model, backend="eager")
    plain = wrapper.autoregressive_infer_cfg(2, LABELS, 0)
    patch(wrapper, best_of())
    assert not torch.equal(wrapper.autoregressive_infer_cfg(2, LABELS, 0), plain)
    assert torch.equal(model.autoregressive_infer_cfg(2, LABELS, 0), plain)
    unpatch(wrapper)
    assert torch.equal(wrapper.autoregressive_infer_cfg(2, LABELS, 0), plain)


@pytest.mark.parametrize("function", [patch, lambda m: patched(m).__enter__()], ids=["patch", "patched"])
def test_unsupported_objects_are_left_alone(function):
    thing = SimpleNamespace(patch_nums=(1, 2))
    with pytest.raises(UnsupportedModelError, match="SimpleNamespace fits no family of models: VAR needs auto"):
        function(thing)
    assert vars(thing) == {"patch_nums": (1, 2)}


OTHER_METHODS = {
    "other words": (lambda images, classes, g_seed=None: None, "takes no B and no label_B"),
    "one word": (lambda B, classes: None, "takes no label_B"),
    "any words": (lambda *args, **kwargs: None, "takes no B and no label_B"),
}


@pytest.mark.parametrize("method, message", OTHER_METHODS.values(), ids=OTHER_METHODS)
def test_a_method_without_the_published_arguments_is_refused(method, message):
    model = stub(autoregressive_infer_cfg=method)
    with pytest.raises(UnsupportedModelError, match=f"autoregressive_infer_cfg {message}"):
        patch(model, loop="fused")
    assert model.autoregressive_infer_cfg is method


def test_a_decorated_method_keeps_the_published_arguments():
    model = small_var()
    plain, calls = model.autoregressive_infer_cfg, []

    @functools.wraps(plain)
    def counted(*args, **kwargs):
        calls.append(args)
        return plain(*args, **kwargs)

    model.autoregressive_infer_cfg = counted
    wanted = model.autoregressive_infer_cfg(2, LABELS, 0)
    with patched(model, **MULTINOMIAL):
        assert torch.equal(model.autoregressive_infer_cfg(2, LABELS, g_seed=0), wanted)
    assert model.autoregressive_infer_cfg is counted and len(calls) == 2  # it ran inside the patch


def test_a_search_that_does_not_fit_leaves_the_model_alone():
    model = small_var()
    for search, sampler, message in (
        (best_of((1, 2)), "philox", "m must have one number for each of 5 scales, got 2"),
        (None, "mersenne", "sampler must be one of 'philox', 'multinomial', got 'mersenne'"),
        (small_scorer(), "philox", r"search must be a search such as varkern.BestOfM\(scorer\).*, got Scorer"),
    ):
        with idle(model), pytest.raises((ValueError, TypeError), match=message):
            patch(model, search, sampler=sampler)
        assert "autoregressive_infer_cfg" not in vars(model)


def test_an_unfit_scorer_is_not_moved():
    model, scorer = small_var().to("meta"), small_scorer(num_scales=4)
    with pytest.raises(ValueError, match="scorer was made for num_scales=4"):
        patch(model, BestOfM(scorer))
    assert {p.device.type for p in scorer.parameters()} == {"cpu"}


def test_a_model_of_other_numbers():
    """Odd sizes: three scales that skip, one class, a vocabulary that is no power of two."""
    vae = VQVAE(37, 5, 8, ch_mult=(1, 2), norm_groups=4, v_patch_nums=(1, 3, 5))
    model = small_var((1, 3, 5), vae=vae, num_classes=1, num_heads=1)
    plain = model.autoregressive_infer_cfg(3, 0, 0, top_k=5)
    with patched(model, **MULTINOMIAL):
        assert torch.equal(model.autoregressive_infer_cfg(3, 0, 0, top_k=5), plain)
    with patched(model, best_of()):
        assert model.autoregressive_infer_cfg(3, 0, 0, top_k=5).shape == (3, 3, 10, 10)
