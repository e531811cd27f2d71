"""The fake form of every op gives the same shape, dtype, strides and device as the real op.

``torch.compile`` plans memory and views by the fake form. If its strides differ from the real ones, compiled code reads
wrong elements. ``opcheck`` compares only the inputs that it gets. Here every op gets inputs of every memory format and
half precision, on both backends. Without a GPU the kernels themselves do not run, since nothing here depends on what
they write.
"""

import pkgutil
from importlib import import_module

import pytest
import torch
from torch._subclasses import FakeTensorMode

from varkern.ops import use_backend
from varkern.ops.backend import interpreting, triton_trouble

OPS = torch.ops.varkern
HALVES = (torch.float32, torch.float16, torch.bfloat16)


def normal(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def formats(x):
    """``x`` in several memory formats, by name."""
    yield "contiguous", x.contiguous()
    yield "transposed", x.transpose(-1, -2).contiguous().transpose(-1, -2)
    yield "every second", torch.stack((x, x), -1).flatten(-2)[..., ::2]
    if x.dim() == 4:
        yield "channels-last", x.contiguous(memory_format=torch.channels_last)
    if x.shape[0] > 1:
        yield "first expanded", x[:1].expand_as(x)


def ids(*shape, top=7):
    return torch.arange(torch.Size(shape).numel()).reshape(shape) % top


def of_uniforms(dtype):
    for layout, seeds in (("contiguous", ids(3)), ("every second", ids(6)[::2])):
        yield layout, OPS.uniforms, (seeds, 2, 5, 1, 2)


def of_sample_tokens(dtype):
    for layout, logits in formats(normal(2, 3, 20, dtype=dtype)):
        yield f"{layout}, guided", OPS.sample_tokens, (logits, logits.flip(0), None, ids(2), 3, 1.5, 1.0, 5, 0.9, 1)
        yield layout, OPS.sample_tokens, (logits, None, None, ids(2), 1, 0.0, 1.0, 0, 0.0, 0)
    empty = normal(0, 3, 40, dtype=dtype)
    yield "no images", OPS.sample_tokens, (empty, None, None, ids(0), 2, 0.0, 1.0, 0, 0.0, 0)


def of_fuse_tokens(dtype):
    tokens = {"contiguous": ids(2, 2, 4), "a part": ids(2, 4, 4)[:, 1:3], "transposed": ids(2, 4, 2).transpose(1, 2)}
    phi = (normal(8, 8, 3, 3), normal(8), 0.5)
    for name, given in tokens.items():
        for layout, f_hat in formats(normal(2, 8, 4, 4)):
            if name == "contiguous" or layout == "channels-last":
                for side, last in (([2, 2], True), ([4, 1], False), ([1, 4], True)):
                    case = (given, normal(7, 8), f_hat, *phi, side, [4, 4], "bicubic", dtype, last)
                    yield f"{name}, {layout}, channels last {last}, {side}", OPS.fuse_tokens, case
    yield (
        "no images",
        OPS.fuse_tokens,
        (ids(0, 3, 4), normal(7, 8), None, None, None, 0.0, [2, 2], [4, 4], "area", dtype, True),
    )


def of_commit_tokens(dtype):
    for layout, f_hat in formats(normal(2, 8, 4, 4)):
        if layout != "first expanded":  # written in place
            case = (ids(2, 4), f_hat, normal(7, 8, dtype=dtype), None, None, 0.0, [2, 2], "bicubic")
            yield layout, OPS.commit_tokens, case


def of_resize_features(dtype):
    for layout, f_hat in formats(normal(2, 8, 4, 4)):
        for last in (False, True):
            for size in ([3, 2], [4, 4], [1, 1]):
                yield f"{layout}, {size}, channels last {last}", OPS.resize_features, (f_hat, size, "area", last)


def of_keep_maps(dtype):
    scores, noise = normal(2, 3), normal(2, 4)
    for layout, score in formats(torch.stack((noise[:, 0], noise[:, 1]), -1)):
        for other, maps in formats(ids(2, 3, 4)):
            yield f"{layout}, {other}", OPS.keep_maps, (maps[:, 0], score[:, 0], maps, scores, noise, 0.5)
        bits = ids(2, 3, 4, 5, top=2).byte()
        yield f"{layout}, bits", OPS.keep_maps, (bits[:, 1].mT.contiguous().mT, score[:, 1], bits, scores, None, 1.0)
    yield "no images", OPS.keep_maps, (ids(0, 4), normal(0), ids(0, 3, 4), normal(0, 3), None, 1.0)


def of_map_norm(dtype):
    weight, bias = normal(8, 3, 4), normal(8, 3, 4, dtype=dtype)
    for layout, x in formats(normal(2, 8, 3, 4, dtype=dtype)):
        yield layout, OPS.map_norm, (x, weight, bias, None, 1.0, 1e-5)
        yield f"{layout}, residual", OPS.map_norm, (x, weight, bias, x.contiguous(), 0.2, 1e-5)
    yield "no maps", OPS.map_norm, (normal(0, 8, 3, 4, dtype=dtype), weight, bias, None, 1.0, 1e-5)
    yield "float64", OPS.map_norm, (normal(2, 8, 3, 4).double(), weight, bias, None, 0.2, 1e-5)


def of_map_norm_backward(dtype):
    weight, bias = normal(8, 3, 4), normal(16, 3, 4, dtype=dtype)[::2]
    known = list(formats(normal(2, 8, 3, 4, dtype=dtype)))
    for number, (layout, x) in enumerate(known):
        for other, grad in (known[number], known[number - 1]):
            yield f"{layout}, {other}", OPS.map_norm_backward, (grad, x, weight, bias, None, 1.0, 1e-5)
            yield f"{layout}, {other}, all", OPS.map_norm_backward, (grad, x, weight, bias, grad, 0.2, 1e-5)
    x = normal(2, 8, 3, 4).double()
    yield "float64", OPS.map_norm_backward, (x, x.mT.contiguous().mT, weight, bias, x, 0.2, 1e-5)


def of_silverman_bandwidth(dtype):
    for layout, x in formats(normal(2, 5, 3, dtype=dtype)):
        for cosine in (False, True):
            yield f"{layout}, cosine {cosine}", OPS.silverman_bandwidth, (x, cosine)


def of_kernel_density(dtype):
    for layout, x in formats(normal(2, 5, 3, dtype=dtype)):
        yield layout, OPS.kernel_density, (x, None, 0.0, True)
        yield f"{layout}, by group", OPS.kernel_density, (x, torch.ones(1).expand(2), 0.0, False)


def of_token_density(dtype):
    for layout, codebook in formats(normal(7, 4, dtype=dtype)):
        if layout != "first expanded":
            for joined in (False, True):
                case = (ids(2, 6, 3)[:, ::2], codebook, None, 0.0, True, joined, False)
                yield f"{layout}, joined {joined}", OPS.token_density, case


def of_bit_density(dtype):
    for layout, bits in formats(normal(2, 5, 3, 4) > 0):
        yield layout, OPS.bit_density, (bits, None, 0.7, False, True)
        yield f"{layout}, bytes", OPS.bit_density, (bits.to(torch.uint8), None, 0.0, False, False)


CASES = {name.removeprefix("of_"): cases for name, cases in list(globals().items()) if name.startswith("of_")}


def registered():
    """The names of varkern's ops."""
    import varkern  # noqa: F401, registers them

    names = (schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("varkern::"))
    return {name.removeprefix("varkern::") for name in names}


def test_no_op_is_forgotten():
    assert set(CASES) == registered()


def described(results):
    results = results if isinstance(results, tuple | list) else (results,)
    return [None if r is None else (tuple(r.shape), r.dtype, r.stride(), r.device.type) for r in results]


# The kernels know no difference between the two kinds of half precision but the type of what they store.
FORMS = [("torch", dtype) for dtype in HALVES] + [("triton", torch.float32), ("triton", torch.bfloat16)]


@pytest.fixture
def launched(monkeypatch) -> list:
    """The kernels that were launched, and did not run if only the interpreter could run them."""
    from varkern import kernels

    found = []
    if not interpreting() or triton_trouble():
        return found
    # All are imported before any is changed: one that is imported later would keep the changed function for ever.
    modules = [import_module(module.name) for module in pkgutil.iter_modules(kernels.__path__, "varkern.kernels.")]
    for module in modules:
        if hasattr(module, "launch"):
            monkeypatch.setattr(module, "launch", lambda kernel, *given, **named: found.append(kernel))
    return found


@pytest.mark.parametrize("backend, dtype", FORMS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_fakes_are_as_the_results(name, dtype, backend, device, request):
    launched = request.getfixturevalue("launched") if backend == "triton" else None
    with use_backend(backend):
        for case, op, arguments in CASES[name](dtype):
            arguments = tuple(a.to(device) if isinstance(a, torch.Tensor) else a for a in arguments)
            with FakeTensorMode() as mode:
                fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
                foreseen = described(op(*fakes))
            assert foreseen == described(op(*arguments)), case
    assert launched or launched is None or not interpreting(), "the launchers were not asked"
