"""Host-side constants of the fusion F(.): resizing as matrices, and phi multiplied into what is looked up.

Everything after the codebook lookup is linear. A scale's interpolation is one small matrix an axis, the same for every
image; phi, ``(1 - blend) * x + blend * conv(x)``, is a single 3x3 convolution whose middle tap carries the identity, so
its nine taps multiplied into the codebook give a table ``[V, 9, C]`` that the kernels look up instead.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

INTERPOLATIONS = ("bicubic", "bilinear", "area", "nearest", "trilinear")

# Rows and columns of a kernel's tile of output pixels, and the step in which it walks over the inputs of a tile.
TILE = 16

# Tables by geometry are kept for good, some kilobytes each: captured CUDA graphs read them. They are made on the host
# whatever PyTorch's default device is, and copied.


@functools.cache
def axis_matrix(side: int, size: int, interpolation: str) -> Tensor:
    """The matrix ``[size, side]``, float64 on the CPU, by which ``F.interpolate`` resizes an axis (all separable)."""
    # nearest picks its source by a float32 quotient; the other modes' weights are better taken in float64.
    dtype = torch.float32 if interpolation == "nearest" else torch.float64
    mode = "bilinear" if interpolation == "trilinear" else interpolation
    with torch.inference_mode(False), torch.no_grad():
        if side == size:
            return torch.eye(side, dtype=torch.float64, device="cpu")
        basis = torch.eye(side, dtype=dtype, device="cpu").view(side, 1, side, 1)
        return F.interpolate(basis, size=(size, 1), mode=mode).view(side, size).t().contiguous().double()


@functools.cache
def axis_matrix_on(side: int, size: int, interpolation: str, device: torch.device) -> Tensor:
    """``axis_matrix`` in float32 on ``device``."""
    with torch.inference_mode(False), torch.no_grad():
        return axis_matrix(side, size, interpolation).to(device, torch.float32)


@functools.cache
def tile_inputs(
    side: int, size: int, interpolation: str, taps: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Which (input place, tap) pairs of one axis reach each tile of ``TILE`` outputs, and with what weight.

    With ``taps == 3`` the axis is resized and then shifted by -1, 0, +1 with zeros from outside, as a 3-wide
    convolution sees it; with ``taps == 1`` only resized.

    Returns:
        ``places`` int32 ``[tiles, 2, K]``: input place and tap, place -1 where there is none, ``K`` the largest number
        of pairs rounded up to ``TILE``; and ``weights`` ``dtype`` ``[tiles, TILE, K]``.
    """
    resized = axis_matrix(side, size, interpolation)
    tiles = -(-size // TILE)
    # seen[y, i, tap]: what output y takes from input i through a tap
    seen = torch.zeros(tiles * TILE, side, taps, dtype=torch.float64, device="cpu")
    for tap in range(taps):
        shift = tap - taps // 2
        first, last = max(0, -shift), min(size, size - shift)
        seen[first:last, :, tap] = resized[first + shift : last + shift]
    pairs = [part.abs().amax(0).nonzero() for part in seen.split(TILE)]
    K = max(TILE, -(-max(len(p) for p in pairs) // TILE) * TILE)
    places = torch.zeros(tiles, 2, K, dtype=torch.int32, device="cpu")
    places[:, 0] = -1
    weights = torch.zeros(tiles, TILE, K, dtype=torch.float64, device="cpu")
    for tile, p in enumerate(pairs):
        places[tile, :, : len(p)] = p.t()
        weights[tile, :, : len(p)] = seen[tile * TILE : (tile + 1) * TILE, p[:, 0], p[:, 1]]
    with torch.inference_mode(False):
        return places.to(device), weights.to(device, dtype)


@functools.cache
def pixel_inputs(side: int, size: int, interpolation: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """The inputs ``[size, T]`` (int32) of every output of one resized axis and their weights ``[size, T]`` (float32).

    ``T`` is the largest number of inputs that an output has; shorter lists are filled up with weight 0.
    """
    resized = axis_matrix(side, size, interpolation)
    order = resized.ne(0).to(torch.int8).argsort(dim=1, descending=True, stable=True)
    order = order[:, : max(1, int(resized.ne(0).sum(1).max()))]
    with torch.inference_mode(False):
        return order.to(device, torch.int32), resized.gather(1, order).to(device, torch.float32)


def folded_phi(weight: Tensor, bias: Tensor | None, blend: float) -> tuple[Tensor, Tensor]:
    """The one convolution ``(weight[C, C, 3, 3], bias[C])``, float64, that equals phi with its blend."""
    channels = weight.shape[0]
    folded = weight.double() * blend
    folded[:, :, 1, 1] += (1.0 - blend) * torch.eye(channels, dtype=torch.float64, device=weight.device)
    if bias is None:
        return folded, folded.new_zeros(channels)
    return folded, bias.double() * blend


def make_convolution(
    dtype: torch.dtype, blend: float, codebook: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, ...]:
    """``codebook[V, C]``, phi's ``weight[C, C, 3, 3]`` (channels-last) and ``bias[C]``, and their products' scale."""
    folded, folded_bias = folded_phi(weight, bias, blend)
    codes, codes_scale = _scaled(codebook.double(), dtype)
    folded, folded_scale = _scaled(folded, dtype)
    folded = folded.contiguous(memory_format=torch.channels_last)
    return codes, folded, folded_bias.float(), codes_scale * folded_scale


def make_tap_table(
    dtype: torch.dtype, blend: float, codebook: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, ...]:
    """The codebook through each of phi's nine taps, ``[V, 9, C]``, phi's bias ``[C]``, and the table's scale."""
    folded, folded_bias = folded_phi(weight, bias, blend)
    taps = folded.permute(1, 2, 3, 0).flatten(1)  # [C_in, 9 * C_out]
    table, scale = _scaled((codebook.double() @ taps).view(len(codebook), 9, -1), dtype)
    return table, folded_bias.float(), scale


def make_codebook(dtype: torch.dtype, blend: float, codebook: Tensor) -> tuple[Tensor, ...]:
    """The codebook as the kernels read it with no phi, ``[V, C]``, and its scale."""
    return _scaled(codebook.double(), dtype)


def _scaled(table: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``table`` as ``dtype`` and a float32 ``[1]`` to multiply it by. Float16 is filled up to 1, so that it cannot
    overflow whatever the weights; that keeps three bits more than bfloat16 would."""
    if dtype == torch.float32:
        return table.float().contiguous(), torch.ones(1, device=table.device)
    scale = table.abs().amax().clamp(min=1e-30)
    return (table / scale).to(dtype).contiguous(), scale.float().view(1)


class _Tables:
    """Tables made from one set of weights: the tensors, what state of the weights they show, and whether those live."""

    def __init__(self, tables: tuple[Tensor, ...], stamp: tuple, sources: list[StorageWeakRef]):
        self.tables, self.stamp, self.sources = tables, stamp, sources


_cache: dict[tuple, _Tables] = {}


def tables_of(
    make: Callable[..., tuple[Tensor, ...]], dtype: torch.dtype, blend: float, *weights: Tensor | None
) -> tuple[Tensor, ...]:
    """``make(dtype, blend, *weights)``, kept until a weight changes or is freed.

    A change shows in the weights' version counters, which every in-place operation, optimizer step and
    ``load_state_dict`` raises; writes through ``.data`` raise none and need ``clear_tables()``. Remade tables take the
    place of the former ones in memory, so that captured CUDA graphs read them too. Weights made under
    ``torch.inference_mode`` have no counter: their tables are made anew at every call.
    """
    given = [weight for weight in weights if weight is not None]
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(given[0].device.type, enabled=False):
        if any(weight.is_inference() for weight in given):
            return make(dtype, blend, *weights)
        storages = [StorageWeakRef(weight.untyped_storage()) for weight in given]
        # While the cache holds its weak reference to a storage no other storage can get the same cdata.
        key = (make, dtype, blend, len(weights)) + tuple(
            (storage.cdata, weight.storage_offset(), tuple(weight.shape), weight.stride(), weight.dtype)
            for storage, weight in zip(storages, given, strict=True)
        )
        stamp = tuple((weight._version, weight.data_ptr()) for weight in given)
        kept = _cache.get(key)
        if kept is not None and kept.stamp == stamp:
            return kept.tables
        made = make(dtype, blend, *weights)
        if given[0].is_cuda and torch.cuda.is_current_stream_capturing():
            return made  # in the graph's own memory, remade at every replay
        if kept is not None:
            for former, new in zip(kept.tables, made, strict=True):
                former.copy_(new)
            kept.stamp = stamp
            return kept.tables
        for stale in [k for k, tables in _cache.items() if any(source.expired() for source in tables.sources)]:
            del _cache[stale]
        _cache[key] = _Tables(made, stamp, storages)
        return made


def list_tables() -> list[tuple[Tensor, ...]]:
    """All tables made from weights that are kept now; a captured CUDA graph that reads some must hold them."""
    return [kept.tables for kept in _cache.values()]


def clear_tables() -> None:
    """Forget all tables made from weights."""
    _cache.clear()
