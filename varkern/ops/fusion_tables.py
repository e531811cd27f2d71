"""Constants of the fusion F(.): resizing as matrices, and tables that combine phi with the codebook.

All operations after the codebook lookup are linear. The interpolation of a scale is one small matrix per axis, the same
for every image. Phi, ``(1 - blend) * x + blend * conv(x)``, is one 3x3 convolution whose middle tap includes the
identity. The codebook multiplied by its nine taps is a table ``[V, 9, C]``, which kernels read instead of the codebook.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Hashable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

# Rows and columns of a kernel's tile of output pixels, and the number of a tile's inputs that it reads per step.
TILE = 16

# Tables that depend only on sizes (some kilobytes each) are never freed, because captured CUDA graphs read them. They
# are made on the CPU, whatever PyTorch's default device is, and copied.


@functools.cache
def axis_matrix(side: int, size: int, interpolation: str) -> Tensor:
    """The matrix ``[size, side]``, float64 on the CPU, that resizes one axis as ``F.interpolate`` does.

    All modes are separable.
    """
    # "nearest" picks its source by a float32 quotient; the weights of the other modes are more exact in float64.
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
    """The pairs (input place, tap) of one axis that reach each tile of ``TILE`` outputs, and their weights.

    With ``taps == 3`` the axis is resized and then shifted by -1, 0, +1 with zero padding, like the input of a 3-wide
    convolution. With ``taps == 1`` it is only resized.

    Returns:
        ``places`` int32 ``[tiles, 2, K]``, input place and tap; unused entries have place -1. ``K`` is the largest
        number of pairs, rounded up to a multiple of ``TILE``. And ``weights`` ``[tiles, TILE, K]`` in ``dtype``.
    """
    resized = axis_matrix(side, size, interpolation)
    tiles = -(-size // TILE)
    # seen[y, i, tap]: the weight of input i in output y through a tap
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

    ``T`` is the largest number of inputs that an output has; shorter lists are padded with weight 0.
    """
    resized = axis_matrix(side, size, interpolation)
    order = resized.ne(0).to(torch.int8).argsort(dim=1, descending=True, stable=True)
    order = order[:, : max(1, int(resized.ne(0).sum(1).max()))]
    with torch.inference_mode(False):
        return order.to(device, torch.int32), resized.gather(1, order).to(device, torch.float32)


def folded_phi(weight: Tensor, bias: Tensor | None, blend: float) -> tuple[Tensor, Tensor]:
    """The convolution ``(weight[C, C, 3, 3], bias[C])`` in float64 that equals phi with its blend."""
    channels = weight.shape[0]
    folded = weight.double() * blend
    folded[:, :, 1, 1] += (1.0 - blend) * torch.eye(channels, dtype=torch.float64, device=weight.device)
    if bias is None:
        return folded, folded.new_zeros(channels)
    return folded, bias.double() * blend


def make_convolution(
    dtype: torch.dtype, blend: float, codebook: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, ...]:
    """``codebook[V, C]``, phi's ``weight[C, C, 3, 3]`` (channels-last) and ``bias[C]``, and the products' scale."""
    folded, folded_bias = folded_phi(weight, bias, blend)
    codes, codes_scale = _scale_table(codebook.double(), dtype)
    folded, folded_scale = _scale_table(folded, dtype)
    folded = folded.contiguous(memory_format=torch.channels_last)
    return codes, folded, folded_bias.float(), codes_scale * folded_scale


def make_tap_table(
    dtype: torch.dtype, blend: float, codebook: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, ...]:
    """The codebook multiplied by each of phi's nine taps ``[V, 9, C]``, phi's bias ``[C]``, and the table's scale."""
    folded, folded_bias = folded_phi(weight, bias, blend)
    taps = folded.permute(1, 2, 3, 0).flatten(1)  # [C_in, 9 * C_out]
    table, scale = _scale_table((codebook.double() @ taps).view(len(codebook), 9, -1), dtype)
    return table, folded_bias.float(), scale


def make_codebook(dtype: torch.dtype, blend: float, codebook: Tensor) -> tuple[Tensor, ...]:
    """The table ``[V, C]`` that kernels read without phi, and its scale."""
    return _scale_table(codebook.double(), dtype)


def _scale_table(table: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``table`` in ``dtype``, and the float32 ``[1]`` by which to multiply it.

    In half precision the largest value is scaled to 1, so that float16 cannot overflow. Float16 keeps three bits more
    than bfloat16 would.
    """
    if dtype == torch.float32:
        return table.float().contiguous(), torch.ones(1, device=table.device)
    scale = table.abs().amax().clamp(min=1e-30)
    return (table / scale).to(dtype).contiguous(), scale.float().view(1)


class _Tables:
    """Tables made from one set of weights: the tensors, the state of the weights, and weak references to these."""

    def __init__(self, tables: tuple[Tensor, ...], stamp: tuple, sources: list[StorageWeakRef]):
        self.tables, self.stamp, self.sources = tables, stamp, sources


_cache: dict[tuple, _Tables] = {}


def tables_of(
    make: Callable[..., tuple[Tensor, ...]], settings: tuple[Hashable, ...], *weights: Tensor | None
) -> tuple[Tensor, ...]:
    """``make(*settings, *weights)``, cached until a weight changes or is freed.

    Changes are noticed by the weights' version counters, which every in-place operation, optimizer step and
    ``load_state_dict`` increases. Writes through ``.data`` do not increase them and need ``clear_tables()``. New tables
    are copied into the memory of the former ones, so that captured CUDA graphs read them too. Weights made under
    ``torch.inference_mode`` have no counter, so their tables are made anew at every call.
    """
    given = [weight for weight in weights if weight is not None]
    kind = given[0].device.type
    plain = torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else contextlib.nullcontext()
    with torch.inference_mode(False), torch.no_grad(), plain:
        if any(weight.is_inference() for weight in given):
            return make(*settings, *weights)
        storages = [StorageWeakRef(weight.untyped_storage()) for weight in given]
        # While the cache holds a weak reference to a storage, no other storage can have the same cdata.
        key = (make, settings, len(weights)) + tuple(
            (storage.cdata, weight.storage_offset(), tuple(weight.shape), weight.stride(), weight.dtype)
            for storage, weight in zip(storages, given, strict=True)
        )
        stamp = tuple((weight._version, weight.data_ptr()) for weight in given)
        kept = _cache.get(key)
        if kept is not None and kept.stamp == stamp:
            return kept.tables
        made = make(*settings, *weights)
        if given[0].is_cuda and torch.cuda.is_current_stream_capturing():
            return made  # in the graph's memory, made anew at every replay
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
    """All cached tables made from weights. A captured CUDA graph that reads one must hold a reference to it."""
    return [kept.tables for kept in _cache.values()]


def clear_tables() -> None:
    """Remove all tables made from weights from the cache."""
    _cache.clear()
