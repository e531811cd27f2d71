"""Kernel density of samples among themselves: VAR-Scaling's measure of how representative a candidate is.

In the paper (arXiv 2601.07293, eq. 2 and 3) the density of a candidate is a sum of Gaussian kernels over all N
candidates, with Silverman's bandwidth. The released code (WD7ang/VAR-Scaling) computes such a sum at every position of
a token map and adds the sums. Both forms are here, for samples in a tensor, for token maps and for binary codes. The
N x N matrices that the released chain of ``cdist``, ``exp`` and ``sum`` keeps in memory are never stored.

Every op is deterministic and batch-invariant. The order of a group's sums depends only on the group's own sizes, so
the result is the same to the last bit with or without other groups in the batch. The exception is
``bandwidth="batch"``, which is defined over the batch.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import get_args

import torch
from torch import Tensor

from varkern.literals import BandwidthRule, Metric, Per
from varkern.ops import density_torch
from varkern.ops.backend import backend_for
from varkern.ops.resizing import refuse_gradients

__all__ = ["bit_density", "kernel_density", "silverman_bandwidth", "token_density"]

METRICS, PER = get_args(Metric), get_args(Per)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def kernel_density(x: Tensor, bandwidth: float | Tensor | None = None, metric: Metric = "euclidean") -> Tensor:
    """Sums of Gaussian kernels over all pairs of samples of a group, including the pair of a sample with itself.

    ``sums[i] = sum_j exp(-distance(i, j)^2 / (2 h^2))``, between 1 and N: eq. 2 without its constant.

    Args:
        x: ``[..., N, D]``, float32, bfloat16 or float16 (computed in float32), any strides; N, D >= 1. The leading
            axes enumerate independent groups of samples. Values should be finite, and with bandwidths below 2^-64
            also below 2^63 in magnitude.
        bandwidth: h, a number > 0, or a float tensor that broadcasts to the leading axes of ``x``. None:
            ``silverman_bandwidth`` of each group. A tensor's values are not checked; 0 means the limit, in which a
            kernel is 1 for a coincident pair and 0 for any other.
        metric: ``"euclidean"``, or ``"cosine"``: distance 1 - cos, computed as half the squared distance of the
            normalised samples, which avoids cancellation for near samples. A zero vector is at distance 1 from every
            other vector and at distance 0 from another zero vector.

    Returns:
        float32 ``[..., N]``. Equal samples are at distance 0 exactly, so a group of N equal samples gives N everywhere.

    Raises:
        TypeError, ValueError: an argument is invalid; checked before any work.
        RuntimeError: an input requires a gradient; none is defined.

    Source: VAR-Scaling, eq. 2.

    Example::

        >>> varkern.ops.kernel_density(torch.tensor([[[0.0], [0.0], [10.0]]]), bandwidth=1.0)
        tensor([[2., 2., 1.]])
    """
    _check_samples("kernel_density", x)
    cosine = _check_choice("metric", metric, METRICS) == "cosine"
    lead = x.shape[:-2]
    groups = x.reshape(math.prod(lead), *x.shape[-2:])
    width, tensor = _check_bandwidth("kernel_density", bandwidth, x.device)
    if tensor is not None:
        tensor = _broadcast(tensor, lead, "the leading axes of x").reshape(math.prod(lead))
    return _kernel_op(groups, tensor, width, cosine).reshape(*lead, x.shape[-2])


def silverman_bandwidth(x: Tensor, metric: Metric = "euclidean") -> Tensor:
    """Silverman's rule for samples in D dimensions: ``h = sigma (N (D + 2) / 4)^(-1 / (D + 4))``.

    sigma is the mean over the dimensions of the standard deviation, computed with a divisor of N and not N - 1: the
    paper does not say which, and the released code uses N. The released code also adds 1e-6 to h, which would make the
    rule depend on the samples' unit. Here h is 0 for equal samples, and the densities are then limits. With
    ``metric="cosine"`` the deviations are those of the normalised samples, since the distance depends only on them.

    Args:
        x: as in ``kernel_density``.
        metric: ``"euclidean"`` or ``"cosine"``.

    Returns:
        float32 ``[...]``, the leading axes of ``x``.

    Raises:
        TypeError, ValueError, RuntimeError: as in ``kernel_density``.

    Source: VAR-Scaling, eq. 3.

    Example::

        >>> varkern.ops.silverman_bandwidth(torch.tensor([[[0.0], [1.0], [2.0], [3.0]]]))
        tensor([0.8975])
    """
    _check_samples("silverman_bandwidth", x)
    cosine = _check_choice("metric", metric, METRICS) == "cosine"
    lead = x.shape[:-2]
    return _silverman_op(x.reshape(math.prod(lead), *x.shape[-2:]), cosine).reshape(lead)


def token_density(
    tokens: Tensor,
    codebook: Tensor,
    per: Per = "position",
    bandwidth: BandwidthRule | float | Tensor = "image",
    metric: Metric = "euclidean",
) -> Tensor:
    """The density of each candidate token map among the N candidates of its image. Codes are looked up in the op.

    ``per="position"`` (the released code): at every position the N codes are samples in C dimensions, and a candidate's
    density is the sum over the positions. ``per="map"`` (the paper): a whole map is one sample in l * C dimensions.

    Args:
        tokens: int64 ``[B, N, l]``, N, l >= 1. Ids must lie in ``[0, V)``, which is not checked: the kernel clamps
            them, and the PyTorch form raises ``IndexError`` on a CPU.
        codebook: ``[V, C]``, float32, bfloat16 or float16 (computed in float32).
        per: ``"position"`` or ``"map"``.
        bandwidth: ``"image"``: ``silverman_bandwidth`` of each image, with ``per="position"`` of each position; the
            released code does this for B=1. ``"batch"``: the mean of these over the batch; the released code does
            this for any B, apart from the 1e-6 that it adds. Or a number > 0; or a float tensor ``[]``, ``[B]``, or
            with ``per="position"`` ``[B, l]``.
        metric: ``"euclidean"`` or ``"cosine"``, as in ``kernel_density``.

    Returns:
        float32 ``[B, N]``, between l and l * N with ``per="position"``, between 1 and N with ``per="map"``.

    Raises:
        TypeError, ValueError, RuntimeError: as in ``kernel_density``.

    Source: VAR-Scaling, section 3.3; ``autoregressive_infer_cfg`` of the released code.

    Example::

        >>> tokens, codebook = torch.zeros(2, 5, 9, dtype=torch.int64), torch.randn(50, 16)
        >>> varkern.ops.token_density(tokens, codebook)[0]  # five equal maps of nine positions
        tensor([45., 45., 45., 45., 45.])
    """
    _check_tokens(tokens, codebook)
    joined = _check_choice("per", per, PER) == "map"
    cosine = _check_choice("metric", metric, METRICS) == "cosine"
    positions = 1 if joined else tokens.shape[2]
    width, tensor, over_batch = _check_rule("token_density", bandwidth, tokens, positions)
    return _token_op(tokens, codebook, tensor, width, over_batch, joined, cosine)


def bit_density(
    bits: Tensor,
    scale: float,
    per: Per = "position",
    bandwidth: BandwidthRule | float | Tensor = "image",
    metric: Metric = "euclidean",
) -> Tensor:
    """``token_density`` for binary codes like Infinity's, whose entries are +scale (bit 1) and -scale (bit 0).

    A squared distance is ``4 * scale^2`` times the number of bits that differ, counted on packed words.

    Args:
        bits: uint8 or bool ``[B, N, l, d]``, N, l, d >= 1; 0 means bit 0, any other value bit 1.
        scale: > 0; Infinity's codes have ``1 / sqrt(d)``. Silverman's bandwidth is proportional to it, so it matters
            only with a bandwidth that is a number or a tensor.
        per: ``"position"``: N samples in d dimensions at each position. ``"map"``: N samples in l * d dimensions.
        bandwidth: as in ``token_density``, in the codes' unit.
        metric: ``"euclidean"``.

    Returns:
        float32 ``[B, N]``, in the ranges of ``token_density``.

    Raises:
        TypeError, ValueError, RuntimeError: as in ``kernel_density``.

    Source: VAR-Scaling's setting for Infinity (Table 1).

    Example::

        >>> varkern.ops.bit_density(torch.zeros(1, 5, 4, 8, dtype=torch.uint8), 0.35)  # five equal maps
        tensor([[20., 20., 20., 20., 20.]])
    """
    if not isinstance(bits, Tensor) or bits.dtype not in (torch.uint8, torch.bool):
        raise TypeError(f"bits must be a uint8 or bool tensor, got {_kind(bits)}")
    if bits.dim() != 4 or 0 in bits.shape[1:]:
        raise ValueError(f"bits must have shape [B, N, l, d], all but B at least 1, got {list(bits.shape)}")
    _check_positive("scale", scale)
    joined = _check_choice("per", per, PER) == "map"
    _check_choice("metric", metric, ("euclidean",))
    width, tensor, over_batch = _check_rule("bit_density", bandwidth, bits, 1 if joined else bits.shape[2])
    if tensor is not None:
        tensor = tensor / (2 * scale)
    return _bit_op(bits, tensor, width / (2 * scale), over_batch, joined)


# ---- Checks ------------------------------------------------------------------------------------------------------


def _kind(value: object) -> str:
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__


def _check_samples(op: str, x: Tensor) -> None:
    if not isinstance(x, Tensor) or x.dtype not in _FLOATS:
        raise TypeError(f"x must be a float32, bfloat16 or float16 tensor, got {_kind(x)}")
    if x.dim() < 2 or 0 in x.shape[-2:]:
        raise ValueError(f"x must have shape [..., N, D], N and D at least 1, got {list(x.shape)}")
    refuse_gradients(op, x=x)


def _check_tokens(tokens: Tensor, codebook: Tensor) -> None:
    if not isinstance(tokens, Tensor) or tokens.dtype != torch.int64:
        raise TypeError(f"tokens must be an int64 tensor, got {_kind(tokens)}")
    if tokens.dim() != 3 or 0 in tokens.shape[1:]:
        raise ValueError(f"tokens must have shape [B, N, l], N and l at least 1, got {list(tokens.shape)}")
    if not isinstance(codebook, Tensor) or codebook.dtype not in _FLOATS:
        raise TypeError(f"codebook must be a float32, bfloat16 or float16 tensor, got {_kind(codebook)}")
    if codebook.dim() != 2 or 0 in codebook.shape:
        raise ValueError(f"codebook must have shape [V, C], both at least 1, got {list(codebook.shape)}")
    if codebook.device != tokens.device:
        raise ValueError(f"codebook must be on the tokens' device {tokens.device}, got {codebook.device}")
    refuse_gradients("token_density", codebook=codebook)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, got {value!r}")
    return value


def _check_positive(name: str, value: float) -> None:
    if not isinstance(value, (int, float, Real)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be finite and > 0, got {value}")


def _check_bandwidth(op: str, bandwidth, device: torch.device) -> tuple[float, Tensor | None]:
    """Returns a number and None, or 0 and a float32 tensor, or 0 and None for Silverman's bandwidth."""
    if bandwidth is None:
        return 0.0, None
    if not isinstance(bandwidth, Tensor):
        _check_positive("bandwidth", bandwidth)
        return float(bandwidth), None
    if not bandwidth.is_floating_point():
        raise TypeError(f"bandwidth must be a number or a float tensor, got {_kind(bandwidth)}")
    if bandwidth.device != device:
        raise ValueError(f"bandwidth must be on the samples' device {device}, got {bandwidth.device}")
    refuse_gradients(op, bandwidth=bandwidth)
    return 0.0, bandwidth.float()


def _check_rule(op: str, bandwidth, samples: Tensor, positions: int) -> tuple[float, Tensor | None, bool]:
    """Like ``_check_bandwidth``, with a tensor ``[B, positions]``; also returns whether to average over the batch."""
    if isinstance(bandwidth, str) or bandwidth is None:
        if bandwidth not in ("image", "batch"):
            raise ValueError(f"bandwidth must be 'image', 'batch', a number or a tensor, got {bandwidth!r}")
        return 0.0, None, bandwidth == "batch"
    width, tensor = _check_bandwidth(op, bandwidth, samples.device)
    if tensor is not None:
        batch_size = samples.shape[0]
        if tensor.shape not in ((), (batch_size,), (batch_size, positions)):
            wanted = f"[], [{batch_size}] or [{batch_size}, {positions}]"
            raise ValueError(f"bandwidth must have shape {wanted}, got {list(tensor.shape)}")
        tensor = tensor.reshape(*tensor.shape, *(1,) * (2 - tensor.dim())).expand(batch_size, positions)
    return width, tensor, False


def _broadcast(tensor: Tensor, shape: torch.Size, what: str) -> Tensor:
    fits = len(tensor.shape) <= len(shape) and all(
        a in (1, b) for a, b in zip(reversed(tensor.shape), reversed(shape), strict=False)
    )
    if not fits:
        raise ValueError(f"bandwidth must broadcast to {what}, {list(shape)}, got {list(tensor.shape)}")
    return tensor.expand(shape)


# ---- Registration ------------------------------------------------------------------------------------------------

# Defined through a Library and not custom_op, whose wrappers take more host time per call than the launch.
# The bandwidth is a tensor, or a width > 0; with neither it is Silverman's.
_library = torch.library.Library("varkern", "FRAGMENT")
_library.define("silverman_bandwidth(Tensor x, bool cosine) -> Tensor")
_library.define("kernel_density(Tensor x, Tensor? bandwidth, float width, bool cosine) -> Tensor")
_library.define(
    "token_density(Tensor tokens, Tensor codebook, Tensor? bandwidth, float width, bool over_batch, bool joined, "
    "bool cosine) -> Tensor"
)
_library.define("bit_density(Tensor bits, Tensor? bandwidth, float width, bool over_batch, bool joined) -> Tensor")
_silverman_op = torch.ops.varkern.silverman_bandwidth.default
_kernel_op = torch.ops.varkern.kernel_density.default
_token_op = torch.ops.varkern.token_density.default
_bit_op = torch.ops.varkern.bit_density.default


def _silverman(x: Tensor, cosine: bool) -> Tensor:
    out = _empty_bandwidths(x, cosine)
    if backend_for(x) == "triton":
        from varkern.kernels import density_bandwidth, density_samples

        density_bandwidth.silverman(density_samples.points(x), cosine, out)
        return out
    return out.copy_(density_torch.bandwidths(density_torch.Points(x), cosine, False)[:, 0])


def _kernel_density(x, bandwidth, width, cosine):
    bandwidth = None if bandwidth is None else bandwidth[:, None]
    if backend_for(x) == "triton":
        from varkern.kernels import density, density_samples

        out = _empty(x)
        density.density(density_samples.points(x), out, bandwidth, width, False, cosine)
        return out
    return _density_in_torch(density_torch.Points(x), bandwidth, width, False, cosine)


def _token_density(tokens, codebook, bandwidth, width, over_batch, joined, cosine):
    if backend_for(tokens) == "triton":
        from varkern.kernels import density, density_samples

        out = _empty(tokens)
        samples = density_samples.token_maps(tokens, codebook, joined)
        density.density(samples, out, bandwidth, width, over_batch, cosine)
        return out
    return _density_in_torch(density_torch.Tokens(tokens, codebook, joined), bandwidth, width, over_batch, cosine)


def _bit_density(bits, bandwidth, width, over_batch, joined):
    if backend_for(bits) == "triton":
        from varkern.kernels import density_bits

        out = _empty(bits)
        density_bits.bit_density(bits, out, bandwidth, width, over_batch, joined)
        return out
    return _density_in_torch(density_torch.Bits(bits, joined), bandwidth, width, over_batch, False)


def _density_in_torch(samples, bandwidth: Tensor | None, width: float, over_batch: bool, cosine: bool) -> Tensor:
    if bandwidth is None and width:
        bandwidth = torch.full((samples.groups, samples.positions), width, device=samples.device)
    elif bandwidth is None:
        bandwidth = density_torch.bandwidths(samples, cosine, over_batch)
    return density_torch.density(samples, bandwidth, cosine)


def _empty(samples: Tensor, *_) -> Tensor:
    return samples.new_empty(samples.shape[:2], dtype=torch.float32)


def _empty_bandwidths(x: Tensor, _) -> Tensor:
    return x.new_empty(x.shape[:1], dtype=torch.float32)


for _name, _form, _fake in (
    ("silverman_bandwidth", _silverman, _empty_bandwidths),
    ("kernel_density", _kernel_density, _empty),
    ("token_density", _token_density, _empty),
    ("bit_density", _bit_density, _empty),
):
    _library.impl(_name, _form, "CompositeExplicitAutograd")
    torch.library.register_fake(f"varkern::{_name}", _fake, lib=_library)
