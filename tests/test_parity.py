"""Drop-in: with one multinomial candidate a scale, a patched model gives the unpatched model's images bit for bit."""

import contextlib
import itertools

import pytest
import torch

from tests.helpers import forked, on, random_states, relative_error, small_var, ten_scale_var
from tests.standins.var import published_var
from varkern import patch, patched
from varkern.search import Choice

LABELS = torch.tensor([3, 0])
SEEDS = (0, 12345, 2**40, None)
MULTINOMIAL = {"sampler": "multinomial"}


def in_bfloat16():
    model = small_var()
    model.vae_proxy[0].bfloat16()
    return model.bfloat16()


PRECISIONS = {
    "float32": (small_var, None),
    "bfloat16 autocast": (small_var, torch.bfloat16),
    "float16 autocast": (small_var, torch.float16),
    "bfloat16 weights": (in_bfloat16, None),
}
STRUCTURES = {
    "shared AdaLN": lambda: small_var(shared_aln=True),
    "plain attention": lambda: small_var(attn_l2_norm=False),
    "subclass": forked,
    "one scale": lambda: small_var((4,)),
    "ten scales": ten_scale_var,
}
LABEL_CASES = {"drawn": None, "int": 5, "negative int": -1, "tensor": LABELS}  # the tensor: see ``placed``
CFG_CASES = {
    "0": 0,
    "1.5": 1.5,
    "4": 4.0,
    "per image": torch.tensor([0.5, 3.0]).view(2, 1, 1),
    "0-dim": torch.tensor(2.0),
}
FILTERS = {"no filter": (0, 0.0), "top-k": (20, 0.0), "top-p": (0, 0.9), "both": (20, 0.9)}


@pytest.fixture(scope="module", params=PRECISIONS.values(), ids=PRECISIONS)
def in_precision(request, device):
    """A model, and the context that it runs in."""
    build, dtype = request.param
    return on(build(), device), lambda: torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()


def placed(x, device):
    """A tensor on ``device``; anything else as it is."""
    return x.to(device) if isinstance(x, torch.Tensor) else x


def call(model, context=contextlib.nullcontext, **arguments):
    """One call from known states of PyTorch's default generators: the images, and all random states it left."""
    torch.manual_seed(99)
    with context():
        images = model.autoregressive_infer_cfg(B=2, **arguments)
    return images, random_states(model)


def same(states, others):
    return all(torch.equal(*pair) for pair in zip(states, others, strict=True))


# Every label with every guidance; the seed, the filters and the smoothing so that every two values of any two meet.
REQUESTS = {
    f"{label}, cfg {cfg}": (label, cfg, (i + j) % 4, bool((i + j + i // 2) % 2))
    for i, label in enumerate(LABEL_CASES)
    for j, cfg in enumerate(CFG_CASES)
}


def test_every_two_values_meet_in_a_request():
    columns = [sorted(set(column), key=str) for column in zip(*REQUESTS.values(), strict=True)]
    for first, second in itertools.combinations(range(4), 2):
        pairs = {(request[first], request[second]) for request in REQUESTS.values()}
        assert pairs == set(itertools.product(columns[first], columns[second]))
    assert [len(column) for column in columns] == [len(LABEL_CASES), len(CFG_CASES), len(FILTERS), 2]


@pytest.mark.parametrize("label, cfg, number, more_smooth", REQUESTS.values(), ids=REQUESTS)
def test_one_multinomial_candidate_is_bit_equal(in_precision, label, cfg, number, more_smooth, device):
    model, context = in_precision
    seed, (top_k, top_p) = SEEDS[number], [*FILTERS.values()][number]
    # Labels come from the host and from the model's device in turn; a guidance by image is the device's alone.
    labels = placed(LABEL_CASES[label], device if top_k else "cpu")
    arguments = {"label_B": labels, "g_seed": seed, "cfg": placed(CFG_CASES[cfg], device), "top_k": top_k}
    arguments |= {"top_p": top_p, "more_smooth": more_smooth}
    plain, state = call(model, context, **arguments)
    with patched(model, **MULTINOMIAL):
        ours, state_after = call(model, context, **arguments)
    assert ours.dtype == plain.dtype and torch.equal(ours, plain)
    assert same(state, state_after)


@pytest.mark.parametrize("build", STRUCTURES.values(), ids=STRUCTURES)
def test_bit_parity_for_every_structure(build, device):
    model = on(build(), device)
    for more_smooth in (False, True):
        arguments = {"label_B": LABELS.int(), "g_seed": 4, "top_k": 30, "top_p": 0.9, "more_smooth": more_smooth}
        plain, _ = call(model, **arguments)
        with patched(model, **MULTINOMIAL):
            assert torch.equal(call(model, **arguments)[0], plain)


@pytest.mark.parametrize("seed", [0, 1, 2, 3, None], ids=str)
def test_bit_parity_for_every_filter(seed, device):
    model = on(small_var(), device)
    for top_k, top_p in (*FILTERS.values(), (1, 0.0), (64, 0.0), (0, 1.0), (63, 1e-9)):
        arguments = {"label_B": LABELS, "g_seed": seed, "top_k": top_k, "top_p": top_p}
        plain, _ = call(model, **arguments)
        with patched(model, **MULTINOMIAL):
            assert torch.equal(call(model, **arguments)[0], plain), (top_k, top_p)


HALVES = {
    # Of the weights of the model, of its quantizer, and of autocast, under which the decoder stays in float32.
    "bfloat16": (torch.bfloat16, torch.bfloat16, None),
    "float16": (torch.float16, torch.float16, None),
    "bfloat16, autocast": (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    "float16, codes in float32, autocast": (torch.float16, torch.float32, torch.float16),
    "bfloat16, codes in float32, autocast": (torch.bfloat16, torch.float32, torch.bfloat16),
    "float32, codes in bfloat16, other autocast": (torch.float32, torch.bfloat16, torch.float16),
}


@pytest.mark.parametrize("weights, codes, autocast", HALVES.values(), ids=HALVES)
def test_bit_parity_with_half_precision_weights(weights, codes, autocast, device):
    """The running sum has the dtype that the published loop gives it, in our own model and in a patched one."""
    published, own = (on(build(), device) for build in (published_var, small_var))
    for model in (published, own):
        vae = model.vae_proxy[0]
        (vae.quantize if autocast else vae).to(codes)
        model.to(weights)
    context = (lambda: torch.autocast(device.type, autocast)) if autocast else contextlib.nullcontext
    for more_smooth in (False, True) if autocast else (False,):  # without autocast the published product has two dtypes
        for seed in (4, None):
            arguments = {"label_B": LABELS.to(device), "g_seed": seed, "top_k": 30, "more_smooth": more_smooth}
            wanted, state = call(published, context, **arguments)
            assert torch.equal(call(own, context, **arguments)[0], wanted)
            for model, loop in ((published, "fused"), (published, "own"), (own, "fused")):
                with patched(model, loop=loop, **MULTINOMIAL):
                    ours, state_after = call(model, context, **arguments)
                assert ours.dtype == wanted.dtype and torch.equal(ours, wanted)
                assert same(state, state_after)


def test_a_search_in_half_precision_gets_float32_and_keeps_the_published_sum():
    """The features of the kept candidate, rounded, are the sum that the published loop would have."""
    model, offered, sums = published_var(), [], []
    model.vae_proxy[0].bfloat16()
    model.bfloat16()

    class First:
        def num_candidates(self, scale, num_scales):
            return 3

        def choose(self, candidates):
            offered.append(candidates.fuse(0, 3))
            return Choice(torch.zeros(2, dtype=torch.int64), candidates.uniforms())

    decode = model.vae_proxy[0].fhat_to_img
    model.vae_proxy[0].fhat_to_img = lambda f_hat: sums.append(f_hat) or decode(f_hat)
    with patched(model, First(), loop="fused", **MULTINOMIAL):
        model.autoregressive_infer_cfg(2, LABELS, 0)
    with patched(model, First(), loop="fused"):
        model.autoregressive_infer_cfg(2, LABELS, 0)
    published, fused = sums
    assert {features.dtype for features in offered} == {torch.float32} and len(offered) == 10
    assert published.dtype == torch.bfloat16 and fused.dtype == torch.float32
    assert relative_error(published, offered[4][:, 0]) < 2**-6 and relative_error(fused, offered[9][:, 0]) < 2**-8


def test_bit_parity_under_inference_mode(device):
    model = on(small_var(), device)
    with torch.inference_mode():
        plain, _ = call(model, label_B=LABELS, g_seed=1)
        assert torch.equal(call(patch(model, **MULTINOMIAL), label_B=LABELS, g_seed=1)[0], plain)
    assert torch.equal(call(model, label_B=LABELS, g_seed=1)[0], plain)


def test_bit_parity_goes_through_the_patch():
    # Should the comparisons above compare the unpatched method with itself, this fails.
    model = small_var()
    with patched(model, **MULTINOMIAL):
        model.blocks[0].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("here")))
        with pytest.raises(RuntimeError, match="here") as caught:
            model.autoregressive_infer_cfg(1, 2)
    assert any(frame.path.name == "patching.py" for frame in caught.traceback)


@pytest.mark.parametrize("seed", [0, None], ids=str)
def test_a_greedy_nucleus_gives_one_image_to_every_sampler(seed, device):
    model = on(small_var(), device)
    plain = model.autoregressive_infer_cfg(2, LABELS, seed, top_k=1)
    with patched(model):
        ours = model.autoregressive_infer_cfg(2, LABELS, seed, top_k=1)
    assert torch.allclose(ours, plain, atol=1e-5)
