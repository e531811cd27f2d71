"""``map_norm`` and its gradients against the definition in float64, in all three forms."""

import math

import pytest
import torch

from tests.references.norm import eager_norm, exact_norm
from varkern.ops import map_norm
from varkern.ops import norm as norm_op
from varkern.ops.backend import use_backend

NAMES = ("x", "weight", "bias", "residual")


def registered(x, weight, bias, *, residual=None, negative_slope=None, eps=1e-5):
    slope = 1.0 if negative_slope is None else negative_slope
    return torch.ops.varkern.map_norm(x, weight, bias, residual, slope, eps)


@pytest.fixture(params=["torch", "registered", "triton"])
def form(request):
    """The PyTorch form under autograd, the PyTorch form as a registered operator, or the kernels."""
    with use_backend("triton" if request.param == "triton" else "torch"):
        yield registered if request.param == "registered" else map_norm


@pytest.fixture
def poisoned():
    """Unwritten memory holds NaN, so that a missing value is noticed."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


def last(x):
    return x.contiguous(memory_format=torch.channels_last)


FORMATS = {
    "NCHW": lambda x: x.contiguous(),
    "NHWC": last,
    "NCWH": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "every other": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "expanded": lambda x: x[:, :, :1].expand(x.shape),
}


def tensors(shape, device, dtype=torch.float32, residual=True, layout="NHWC", seed=0):
    """{name: tensor} of the op's random arguments, weights in float32."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator).to(device)

    given = {
        "x": FORMATS[layout]((normal(*shape) * 2 + 1).to(dtype)),
        "weight": normal(*shape[1:]) + 1,
        "bias": normal(*shape[1:]),
        "residual": FORMATS[layout](normal(*shape).to(dtype)) if residual else None,
    }
    return given


def applied(function, given, slope, eps=1e-5):
    given = dict(given)
    return function(given.pop("x"), given.pop("weight"), given.pop("bias"), **given, negative_slope=slope, eps=eps)


def exact(given, slope, eps=1e-5):
    return exact_norm(*(given[name] for name in NAMES), slope, eps)


def gradients(result, given, grad):
    asked = [tensor for tensor in given.values() if tensor is not None]
    return torch.autograd.grad(result, asked, grad)


def asking(given):
    return {name: tensor if tensor is None else tensor.detach().requires_grad_() for name, tensor in given.items()}


def check(actual, wanted, dtype, largest=None):
    """One rounding to ``dtype``, and float32 sums of terms that add up to ``largest`` (default: the largest wanted)."""
    tolerance = 3e-6 * (wanted.abs().max() if largest is None else largest) if wanted.numel() else 0
    if dtype in (torch.bfloat16, torch.float16):
        tolerance = tolerance + wanted.abs() * torch.finfo(dtype).eps * 0.51 + torch.finfo(dtype).tiny
    assert actual.shape == wanted.shape and actual.dtype == dtype
    assert not (actual.double() - wanted).isnan().any()
    assert ((actual.double() - wanted).abs() <= tolerance).all(), (actual.double() - wanted).abs().max()


OPTIONS = {
    "norm alone": {"residual": False, "slope": None},
    "norm, activation": {"residual": False, "slope": 0.2},
    "norm, residual": {"residual": True, "slope": None},
    "all": {"residual": True, "slope": 0.2},
}
SHAPES = [(2, 32, 5, 3), (3, 37, 2, 7), (1, 260, 1, 2), (5, 1, 2, 1), (4, 3, 1, 1), (1, 64, 8, 8), (2, 64, 9, 8)]


# Every shape with all options, and every choice of options with one shape of odd sizes and one of powers of two.
CASES = [
    pytest.param(shape, options, id=f"{shape}-{name}")
    for number, shape in enumerate(SHAPES)
    for name, options in OPTIONS.items()
    if name == "all" or number in (1, 5)
]


@pytest.mark.thinned(every=2)
@pytest.mark.parametrize("shape, options", CASES)
def test_values_and_gradients(form, device, poisoned, shape, options):
    slope = options["slope"]
    given = asking(tensors(shape, device, residual=options["residual"]))
    wanted = exact(given, slope)
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(9)).to(device)
    y = applied(form, given, slope)
    check(y, wanted, torch.float32)
    for actual, true in zip(gradients(y, given, grad), gradients(wanted, given, grad.double()), strict=True):
        # The gradient of two numbers is a difference of nearly equal terms, each 1 / sqrt(eps) times the gradient.
        check(actual, true.double(), torch.float32, largest=None if wanted[0].numel() > 2 else 1e3)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_memory_formats_and_precisions(form, device, poisoned, dtype, layout):
    given = asking(tensors((2, 24, 3, 5), device, dtype, layout=layout))
    y = applied(form, given, 0.2)
    wanted = exact(given, 0.2)
    check(y, wanted, dtype)
    assert y.stride() == torch.empty_like(given["x"]).stride()
    grad = FORMATS[layout](torch.randn(2, 24, 3, 5, generator=torch.Generator().manual_seed(9)).to(device, dtype))
    # As float64 sees them: the leaves' own gradients would be rounded on their way.
    wide = asking({name: tensor.detach().double() for name, tensor in given.items()})
    found = gradients(y, given, grad)
    true = gradients(exact(wide, 0.2), wide, grad.double())
    for actual, wanted, tensor in zip(found, true, given.values(), strict=True):
        check(actual, wanted, tensor.dtype)
        if form is registered:  # autograd's backward does not promise this
            assert actual.stride() == torch.empty_like(tensor).stride()


@pytest.mark.parametrize("kinds", [("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "float64")], ids=str)
def test_weights_and_residual_of_another_type(form, device, kinds):
    dtype, other = (getattr(torch, kind) for kind in kinds)
    given = tensors((2, 16, 3, 2), device, dtype)
    given |= {name: given[name].to(other) for name in NAMES[1:]}
    given = asking(given)
    y = applied(form, given, 0.2)
    check(y, exact(given, 0.2), dtype)
    wide = asking({name: tensor.detach().double() for name, tensor in given.items()})
    true = gradients(exact(wide, 0.2), wide, torch.ones_like(y).double())
    for actual, wanted, tensor in zip(gradients(y, given, torch.ones_like(y)), true, given.values(), strict=True):
        if tensor.dtype == torch.float64:
            assert actual.dtype == torch.float64
            actual = actual.float()
        check(actual, wanted, actual.dtype)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_many_maps_over_few_programs(form, device, layout):
    """Sums over more maps than the backward kernel has programs, and not over a multiple of their number."""
    given = asking(tensors((23, 6, 3, 2), device, layout=layout))
    grad = torch.randn(23, 6, 3, 2, generator=torch.Generator().manual_seed(9)).to(device)
    found = gradients(applied(form, given, 0.2), given, grad)
    true = gradients(exact(given, 0.2), given, grad.double())
    for actual, wanted in zip(found, true, strict=True):
        check(actual, wanted.double(), torch.float32)
    again = gradients(applied(form, given, 0.2), given, grad)
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


def test_no_worse_than_pytorch(form, device):
    """In bfloat16 the error is one rounding; PyTorch's chain of functions rounds three times."""
    given = tensors((4, 48, 4, 4), device, torch.bfloat16)
    halves = [given[name].bfloat16() for name in ("weight", "bias")]
    chain = eager_norm(given["x"], *halves, given["residual"], 0.2)
    ours = applied(form, {**given, "weight": halves[0], "bias": halves[1]}, 0.2)
    wanted = exact({**given, "weight": halves[0], "bias": halves[1]}, 0.2)
    assert (ours.double() - wanted).square().mean() < 0.7 * (chain.double() - wanted).square().mean()


@pytest.mark.parametrize("offset", [0.0, 1e3, -3e4])
def test_a_large_mean_cancels_nothing(form, device, offset):
    """Squares are of what is left of the mean. Rounding x itself is no error here: the reference has the same x.

    The mean errs by the rounding of its sum (an ulp), of 1 / C and of their product (half an ulp each).
    """
    x = last(torch.randn(2, 40, 3, 3, generator=torch.Generator().manual_seed(0)) + offset).to(device)
    one, zero = torch.ones(40, 3, 3, device=device), torch.zeros(40, 3, 3, device=device)
    error = (form(x, one, zero).double() - exact_norm(x, one, zero)).abs().max()
    assert error < 3e-6 + 2 * abs(offset) * 2.0**-23


def test_maps_are_their_own(form, device):
    """A map's result does not change by one bit with the other maps of its batch, not even if they hold NaN."""
    given = tensors((7, 20, 4, 4), device)
    whole = applied(form, given, 0.2)
    for batch in (slice(0, 1), slice(2, 7), slice(6, 7)):
        alone = {name: t[batch] if name in ("x", "residual") else t for name, t in given.items()}
        assert torch.equal(applied(form, alone, 0.2), whole[batch])
    given["x"][1, 3, 2, 2] = math.nan
    spoilt = applied(form, given, 0.2)
    assert spoilt[1].isnan().all()
    spoilt[1] = whole[1]
    assert torch.equal(spoilt, whole)


@pytest.mark.parametrize("slope", [0.0, 0.2, 1.0, 1.5, -0.5])
def test_slopes_and_the_kink(form, device, slope):
    """Equal numbers have n = 0, so p is the bias alone; at p = 0 the gradient is PyTorch's, ``slope``."""
    x = last(torch.full((3, 4, 1, 2), 2.0)).to(device).requires_grad_()
    weight, residual = torch.ones(4, 1, 2, device=device), torch.zeros(3, 4, 1, 2, device=device, requires_grad=True)
    bias = torch.tensor([0.0, 1.0, -1.0, 0.0, 2.0, 0.0, -2.0, -0.0], device=device).view(4, 1, 2).requires_grad_()
    y = form(x, weight, bias, residual=residual, negative_slope=slope)
    assert torch.equal(y[1], torch.nn.functional.leaky_relu(bias, slope))
    y.sum().backward()
    wanted = torch.tensor([slope, 1, slope, slope, 1, slope, slope, slope], device=device).view(4, 1, 2)
    assert torch.allclose(residual.grad[2], wanted) and torch.allclose(bias.grad, 3 * wanted)
    assert not x.grad.isnan().any()


@pytest.mark.parametrize("eps", [1e-5, 1.0])
def test_eps(form, device, eps):
    given = tensors((1, 6, 2, 2), device)
    given["x"] *= 0.1
    check(applied(form, given, None, eps), exact(given, None, eps), torch.float32)


def test_empty(form, device, poisoned):
    shape = (0, 5, 3, 2)
    given = asking(tensors(shape, device))
    y = applied(form, given, 0.2)
    assert y.shape == shape
    found = gradients(y, given, torch.ones_like(y))
    assert [tuple(g.shape) for g in found] == [shape, shape[1:], shape[1:], shape]
    assert not any(g.isnan().any() or g.any() for g in found)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_gradcheck(form, device, options, layout):
    """Float64 takes the PyTorch form on every device and backend."""
    given = tensors((2, 3, 1, 2), device, torch.float64, options["residual"], layout)
    names = [name for name in NAMES if given[name] is not None]

    def function(*values):
        return applied(form, {**given, **dict(zip(names, values, strict=True))}, options["slope"])

    asked = [given[name].double().requires_grad_() for name in names]
    assert function(*asked).dtype == torch.float64
    assert torch.autograd.gradcheck(function, asked)


@pytest.mark.parametrize("asked", [(name,) for name in NAMES] + [("weight", "residual")], ids="-".join)
def test_some_gradients(form, device, asked):
    given = tensors((2, 7, 2, 2), device)
    everything = asking(given)
    wanted = dict(zip(NAMES, gradients(applied(form, everything, 0.2).sum(), everything, None), strict=True))
    some = {name: tensor.requires_grad_(name in asked) for name, tensor in given.items()}
    applied(form, some, 0.2).sum().backward()
    for name, tensor in some.items():
        assert (tensor.grad is not None) == (name in asked)
        assert tensor.grad is None or torch.equal(tensor.grad, wanted[name])


def test_inputs_are_left_alone(form, device):
    given = asking(tensors((2, 6, 3, 3), device))
    before = {name: tensor.detach().clone() for name, tensor in given.items()}
    applied(form, given, 0.2).sum().backward()
    assert all(torch.equal(given[name], before[name]) for name in NAMES)


def test_longer_than_a_program(device, monkeypatch):
    """Maps that a program cannot hold use the PyTorch form; the limit is smaller for backward than for forward."""
    given = asking(tensors((2, 17, 2, 2), device))
    with use_backend("torch"):
        wanted = applied(map_norm, given, 0.2)
    monkeypatch.setattr("varkern.kernels.norm.backward", lambda *_: pytest.fail("took the kernel backward"))
    monkeypatch.setattr(norm_op, "MAX_NUMBERS_BACKWARD", 67)
    with use_backend("triton"):
        y = applied(map_norm, given, 0.2)
        for found, true in zip(*(gradients(t.sum(), given, None) for t in (y, wanted)), strict=True):
            check(found, true.double(), torch.float32)
    monkeypatch.setattr("varkern.kernels.norm.forward", lambda *_: pytest.fail("took the kernel"))
    monkeypatch.setattr(norm_op, "MAX_NUMBERS", 67)
    with use_backend("triton"):
        assert torch.equal(applied(map_norm, given, 0.2), wanted)


@pytest.mark.parametrize("shape", [(1, 66, 8, 16), (1, 130, 8, 16)], ids=str)
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_weights_read_anew_for_every_map(device, quick_backend, shape, layout):
    """Maps for which a program does not keep the weights in registers, up to the longest that the kernel takes."""
    given = asking(tensors(shape, device, layout=layout))
    with use_backend(quick_backend):
        y = applied(map_norm, given, 0.2)
    wanted = exact(given, 0.2)
    check(y, wanted, torch.float32)
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(9)).to(device)
    for actual, true in zip(gradients(y, given, grad), gradients(wanted, given, grad.double()), strict=True):
        check(actual, true.double(), torch.float32)


X = torch.zeros(2, 4, 3, 3)
BAD = [
    pytest.param({"x": torch.zeros(4, 3, 3)}, ValueError, r"x must have shape \[N, C, H, W\].*\[4, 3, 3\]", id="rank"),
    pytest.param({"x": torch.zeros(2, 0, 3, 3)}, ValueError, r"x must have shape .*\[2, 0, 3, 3\]", id="channels"),
    pytest.param({"x": torch.zeros(2, 4, 0, 3)}, ValueError, r"H and W at least 1, got \[2, 4, 0, 3\]", id="pixels"),
    pytest.param({"x": X.long()}, TypeError, "x must be float32, .*got torch.int64", id="dtype"),
    pytest.param({"weight": torch.ones(4)}, ValueError, r"weight must have shape \[4, 3, 3\], got \[4\]", id="weight"),
    pytest.param(
        {"weight": torch.ones(4, 3, 3).int()}, TypeError, "weight must be float32, .*int32", id="weight-dtype"
    ),
    pytest.param(
        {"bias": torch.ones(3, 3, 4)}, ValueError, r"bias must have shape \[4, 3, 3\], got \[3, 3, 4", id="bias"
    ),
    pytest.param(
        {"bias": torch.ones(4, 3, 3, device="meta")}, ValueError, "bias must be on x's device cpu", id="device"
    ),
    pytest.param({"residual": X[:1]}, ValueError, r"residual must have shape \[2, 4, 3, 3\], got \[1", id="residual"),
    pytest.param({"negative_slope": math.nan}, ValueError, "negative_slope must be .*got nan", id="slope"),
    pytest.param({"negative_slope": "0.2"}, ValueError, "negative_slope must be .*got '0.2'", id="slope-text"),
    pytest.param({"eps": 0.0}, ValueError, "eps must be a finite number > 0, got 0.0", id="eps"),
    pytest.param({"eps": math.inf}, ValueError, "eps must be a finite number > 0, got inf", id="eps-inf"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input(change, error, message):
    given = {"x": X, "weight": torch.ones(4, 3, 3), "bias": torch.ones(4, 3, 3)} | change
    with pytest.raises(error, match=message):
        map_norm(given.pop("x"), given.pop("weight"), given.pop("bias"), **given)
