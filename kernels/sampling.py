"""Draw M candidate tokens for every row of logits, reading the row once.

Formula (``varkern.ops.sampling`` states the contract): with ``x = ((1 + t)·cond − t·uncond) / temperature`` keep the
``top_k`` largest x, then the smallest set of most probable tokens whose mass reaches ``top_p``, ties by lower index;
draw m is the first index whose running sum of kept weights exceeds ``u_m · total``. It replaces
``sample_with_top_k_top_p_`` of FoundationVision/VAR, two sorts and five passes over the logits for every draw.

``sample_kernel`` holds a row in registers, one program a row; a row too long for that is read again, tile by tile, at
every step of a search. With a top-k well below V two kernels share the work, because the searches' arithmetic and not
the read would bound one: ``shortlist_kernel`` writes out, in vocabulary order, no fewer than the top_k largest and no
more than a capacity; ``sample_shortlist_kernel``, one warp a row, filters those exactly and draws. A row in which ties
overflow the shortlist is read again in full.

The second launch pays: at V=4096, top_k=900, M=1 the two execute 8,500 warp instructions a row (sm_90, Triton 3.9, 24
rows of normal logits) and one kernel 31,600, since some fourteen search steps run over 1024 logits within a warp, not
over 4096 across eight. Between them go 6 bytes a logit kept, 4 of them read again: 10 kB a row, beside 32 kB of logits.

Draws go through a two-level running sum: the sums of GROUPS groups are kept, and the one group that a draw lands in is
read again, from cache. Bound by bytes: the logits, once.
"""

import functools
import statistics

import torch
import triton
import triton.language as tl

from .launching import launch
from .philox import philox_uniform_bits
from .sampling_search import (
    COUNT,
    INFINITY,
    LARGEST,
    TOP_P_BITS,
    UNIFORM_BITS,
    extremes,
    filter_row,
    fixed_weights,
    kept_weights,
    load_logits,
    load_shortlist,
    measure_from,
    next_above,
    rough_weights,
    row_start,
    scaled,
    tile_columns,
)
from .sampling_shortlist import HEADER, shortlist_kernel
from .sampling_small import TOKENS, sample_small_kernel

LARGEST_SMALL = 32
LARGEST_RESIDENT = 8192
LARGEST_SHORTLISTED = 16384


@triton.jit
def _running_sums(
    row, x, columns, weights, shift, threshold, tie,
    GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    """Sums of kept weights up to the end of every group [GROUPS], and over the row."""
    if RESIDENT:
        if tie < GROUPS * GROUP_SIZE:
            weights = kept_weights(x, columns, weights, threshold, tie)
        sums = tl.sum(tl.where(x >= threshold, weights, 0.0).to(tl.int64), 1)  # [GROUPS]
    else:
        sums = tl.zeros([GROUPS], tl.int64)
        for group in range(GROUPS):
            of_tile = tile_columns(group, 1, GROUP_SIZE)
            tile = load_logits(row, of_tile)  # [1, GROUP_SIZE]
            kept = kept_weights(tile, of_tile, fixed_weights(tile, shift), threshold, tie)
            sums = tl.where(tl.arange(0, GROUPS) == group, tl.sum(kept), sums)
    return tl.cumsum(sums, 0), tl.sum(sums)


@triton.jit
def _draw(
    row, shift, threshold, tie, running, total, bits,
    GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr, DRAWS: tl.constexpr,
):  # fmt: skip
    """Columns for draws ``bits`` [DRAWS]: find the group by the running sums, then read it again."""
    wanted = scaled(total, bits, UNIFORM_BITS, False)  # [DRAWS]
    behind = running[:, None] <= wanted[None, :]  # [GROUPS, DRAWS]
    before = tl.max(tl.where(behind, running[:, None], 0), 0)  # [DRAWS]
    group = tl.minimum(tl.sum(behind.to(tl.int32), 0), GROUPS - 1)  # [DRAWS]
    columns = group[None, :] * GROUP_SIZE + tl.arange(0, GROUP_SIZE)[:, None]  # [GROUP_SIZE, DRAWS]
    x = load_logits(row, columns)
    kept = kept_weights(x, columns, fixed_weights(x, shift), threshold, tie)
    inner = before[None, :] + tl.cumsum(kept, 0)
    place = tl.sum((inner <= wanted[None, :]).to(tl.int32), 0)  # [DRAWS]
    return tl.where(total > 0, group * GROUP_SIZE + place, 0)


@triton.jit
def _sample_row(
    row, tokens_of_columns_ptr, tokens_ptr, place, found, top_k, nucleus,
    FILTER_TOP_K: tl.constexpr, FILTER_NUCLEUS: tl.constexpr,
    GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr, RESIDENT: tl.constexpr, DRAWS: tl.constexpr,
):  # fmt: skip
    """Filter one row, draw, and store. The columns of a shortlist stand for the tokens at ``tokens_of_columns_ptr``.

    ``found``: None, or of a shortlist a value that none of its logits is below, and a guess at the top-k threshold.
    """
    image, position, length, num_candidates, scale, seed_ptr = place
    columns = tile_columns(0, GROUPS if RESIDENT else 1, GROUP_SIZE)  # [GROUPS or 1, GROUP_SIZE]
    if found is None:
        x = load_logits(row, columns)
        low, largest = extremes(row, x, -LARGEST, INFINITY, GROUPS, GROUP_SIZE, RESIDENT)
        guess = INFINITY
        count = 0
        if FILTER_TOP_K:
            count = measure_from(row, x, None, 0.0, low, COUNT, GROUPS, GROUP_SIZE, RESIDENT)
    else:
        x = load_shortlist(row, columns)
        low, guess = found
        largest = tl.max(x)
        count = row[4]
    shift = tl.where(largest == -INFINITY, 0.0, largest)
    weights = rough_weights(x, shift)
    threshold, tie = filter_row(
        row, x, columns, weights, shift, low, count, next_above(largest), guess, top_k, nucleus,
        FILTER_TOP_K, FILTER_NUCLEUS, GROUPS, GROUP_SIZE, RESIDENT,
    )  # fmt: skip
    running, total = _running_sums(row, x, columns, weights, shift, threshold, tie, GROUPS, GROUP_SIZE, RESIDENT)
    seed = tl.load(seed_ptr)
    for first in range(0, num_candidates, DRAWS):
        candidates = first + tl.arange(0, DRAWS)  # [DRAWS]
        inside = candidates < num_candidates
        bits = philox_uniform_bits(seed, position, candidates, scale, TOKENS)
        tokens = _draw(row, shift, threshold, tie, running, total, bits, GROUPS, GROUP_SIZE, DRAWS)
        if tokens_of_columns_ptr is not None:
            tokens = tl.load(tokens_of_columns_ptr + tokens, mask=tokens < row[4], other=0).to(tl.int32)
        places = (image.to(tl.int64) * num_candidates + candidates) * length + position
        tl.store(tokens_ptr + places, tokens.to(tl.int64), mask=inside)


@triton.jit
def _sample_logits(
    cond_ptr, uncond_ptr, strengths_ptr, tokens_ptr,
    stride_cond_image, stride_cond_position, stride_uncond_image, stride_uncond_position,
    place, vocabulary, guidance, inverse_temperature, top_k, nucleus,
    FILTER_TOP_K: tl.constexpr, FILTER_NUCLEUS: tl.constexpr, FULL: tl.constexpr,
    GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr, RESIDENT: tl.constexpr, DRAWS: tl.constexpr,
):  # fmt: skip
    """``_sample_row`` for a row of the logits themselves. FULL: GROUPS * GROUP_SIZE is the vocabulary, not more."""
    image = place[0]
    position = place[1]
    row = (
        row_start(cond_ptr, stride_cond_image, stride_cond_position, image, position),
        None if uncond_ptr is None else row_start(
            uncond_ptr, stride_uncond_image, stride_uncond_position, image, position
        ),
        guidance if strengths_ptr is None else tl.load(strengths_ptr + image),
        inverse_temperature,
        None if FULL else vocabulary,
    )  # fmt: skip
    _sample_row(
        row, None, tokens_ptr, place, None, top_k, nucleus,
        FILTER_TOP_K, FILTER_NUCLEUS, GROUPS, GROUP_SIZE, RESIDENT, DRAWS,
    )  # fmt: skip


UNSPECIALISED = ["length", "vocabulary", "num_candidates", "scale", "top_k", "nucleus"]


@triton.jit(do_not_specialize=UNSPECIALISED)
def sample_kernel(
    cond_ptr, uncond_ptr, strengths_ptr, seeds_ptr, tokens_ptr,
    stride_cond_image, stride_cond_position, stride_uncond_image, stride_uncond_position,
    length, vocabulary, num_candidates, scale, guidance, inverse_temperature, top_k, nucleus,
    FILTER_TOP_K: tl.constexpr, FILTER_NUCLEUS: tl.constexpr, FULL: tl.constexpr,
    GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr, RESIDENT: tl.constexpr, DRAWS: tl.constexpr,
):  # fmt: skip
    """One program per row, ``image * length + position``."""
    image = tl.program_id(0) // length
    position = tl.program_id(0) % length
    place = (image, position, length, num_candidates, scale, seeds_ptr + image)
    _sample_logits(
        cond_ptr, uncond_ptr, strengths_ptr, tokens_ptr,
        stride_cond_image, stride_cond_position, stride_uncond_image, stride_uncond_position,
        place, vocabulary, guidance, inverse_temperature, top_k, nucleus,
        FILTER_TOP_K, FILTER_NUCLEUS, FULL, GROUPS, GROUP_SIZE, RESIDENT, DRAWS,
    )  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALISED)
def sample_shortlist_kernel(
    cond_ptr, uncond_ptr, strengths_ptr, seeds_ptr, headers_ptr, values_ptr, columns_ptr, tokens_ptr,
    stride_cond_image, stride_cond_position, stride_uncond_image, stride_uncond_position,
    length, vocabulary, num_candidates, scale, guidance, inverse_temperature, top_k, nucleus,
    FILTER_NUCLEUS: tl.constexpr, FULL: tl.constexpr, CAPACITY: tl.constexpr, GROUP_SIZE: tl.constexpr,
    DRAWS: tl.constexpr, FULL_GROUPS: tl.constexpr, FULL_GROUP_SIZE: tl.constexpr,
):  # fmt: skip
    """What ``shortlist_kernel`` left, filtered and drawn from: one program a row, again."""
    index = tl.program_id(0)
    image = index // length
    position = index % length
    place = (image, position, length, num_candidates, scale, seeds_ptr + image)
    headers_ptr += index * HEADER
    count = tl.load(headers_ptr).to(tl.int32)
    if count <= CAPACITY:
        start = index.to(tl.int64) * CAPACITY
        row = (values_ptr + start, None, None, None, count)
        found = (tl.load(headers_ptr + 1), tl.load(headers_ptr + 2))
        _sample_row(
            row, columns_ptr + start, tokens_ptr, place, found, top_k, nucleus,
            True, FILTER_NUCLEUS, CAPACITY // GROUP_SIZE, GROUP_SIZE, True, DRAWS,
        )  # fmt: skip
    else:
        _sample_logits(
            cond_ptr, uncond_ptr, strengths_ptr, tokens_ptr,
            stride_cond_image, stride_cond_position, stride_uncond_image, stride_uncond_position,
            place, vocabulary, guidance, inverse_temperature, top_k, nucleus,
            True, FILTER_NUCLEUS, FULL, FULL_GROUPS, FULL_GROUP_SIZE, False, 1,
        )  # fmt: skip


@functools.cache
def plan(vocabulary: int, num_candidates: int, top_k: int) -> dict:
    """How a problem is launched: which kernels, and their compile-time sizes.

    "small": all pairs compared, up to V=32. "row": one program a row. "shortlist": two kernels, if a power of two from
    17/16 of top_k up is at most half the (padded) row. A thread holds 32 logits, or 16 and their weights where several
    warps share a row. Many draws look through short groups, so that looking up a draw costs least.
    """
    draws = 1 if num_candidates == 1 else 4 if num_candidates <= 4 else 16
    block = triton.next_power_of_2(vocabulary)
    if vocabulary <= LARGEST_SMALL:
        rows = max(1, min(512, 2048 // (block * block)))  # more of them, for V=1, do not fit into registers
        return {"kind": "small", "sample": {"ROWS": rows, "BLOCK": block, "num_warps": 4}}
    full = {"FULL": vocabulary == block}
    capacity = max(64, triton.next_power_of_2(top_k + max(top_k // 16, 8)))
    if 0 < top_k < vocabulary <= LARGEST_SHORTLISTED and 2 * capacity <= block:
        normal = statistics.NormalDist()
        deviations = normal.inv_cdf(1 - (top_k + capacity) / 2 / vocabulary)
        groups = {"GROUPS": block // 32, "GROUP_SIZE": 32, "num_warps": max(1, block // 1024)}
        group_size = 16 if num_candidates > 4 else min(64, capacity // 2)
        sizes = {"GROUP_SIZE": group_size, "DRAWS": draws, "num_warps": max(1, capacity // 1024)}
        again = {"FULL_GROUPS": max(1, block // 256), "FULL_GROUP_SIZE": min(block, 256)}
        return {
            "kind": "shortlist",
            "shortlist": {**full, "CAPACITY": capacity, **groups},
            "sample": {**full, "CAPACITY": capacity, **sizes, **again},
            "deviations": deviations,
            "spacing": 1 / vocabulary / normal.pdf(deviations),
        }
    if vocabulary <= LARGEST_RESIDENT:
        group_size = 32 if block <= 4096 else 64
        sizes = {"GROUPS": block // group_size, "GROUP_SIZE": group_size, "RESIDENT": True, "DRAWS": draws}
        return {"kind": "row", "sample": {**full, **sizes, "num_warps": max(1, min(16, block // 512))}}
    groups = triton.next_power_of_2(triton.cdiv(vocabulary, 4096))
    sizes = {"GROUPS": groups, "GROUP_SIZE": 4096, "RESIDENT": False, "DRAWS": 1, "num_warps": 8}
    return {"kind": "row", "sample": {"FULL": groups * 4096 == vocabulary, **sizes}}


def sample(
    logits: torch.Tensor,
    uncond_logits: torch.Tensor | None,
    strengths: torch.Tensor | None,
    seeds: torch.Tensor,
    num_candidates: int,
    guidance: float,
    inverse_temperature: float,
    top_k: int,
    top_p: float,
    scale: int,
) -> torch.Tensor:
    """Launch. Arguments and result as ``varkern.ops.sampling.sample_in_torch``; the op has checked them."""
    batch_size, length, vocabulary = logits.shape
    logits = logits if logits.stride(2) == 1 else logits.contiguous()
    strides = [logits.stride(0), logits.stride(1), 0, 0]
    if uncond_logits is not None:
        uncond_logits = uncond_logits if uncond_logits.stride(2) == 1 else uncond_logits.contiguous()
        strides[2:] = uncond_logits.stride(0), uncond_logits.stride(1)
    num_rows = batch_size * length

    tokens = torch.empty((batch_size, num_candidates, length), dtype=torch.int64, device=logits.device)
    if num_rows == 0:
        return tokens
    inputs = (logits, uncond_logits, strengths)
    nucleus = int(top_p * 2**TOP_P_BITS.value)
    if inverse_temperature == 1:
        inverse_temperature = None
    sizes = (length, vocabulary, num_candidates, scale, guidance, inverse_temperature, top_k, nucleus)
    chosen = plan(vocabulary, num_candidates, top_k)
    options = {**chosen["sample"], "FILTER_NUCLEUS": 0 < top_p < 1}
    if chosen["kind"] == "shortlist":
        capacity = options["CAPACITY"]
        shapes = ((HEADER.value, torch.float32), (capacity, torch.float32), (capacity, torch.int16))
        shortlist = [torch.empty((num_rows, n), dtype=dtype, device=logits.device) for n, dtype in shapes]
        launch(
            shortlist_kernel, (num_rows,),
            *inputs, *shortlist, *strides,
            length, vocabulary, guidance, inverse_temperature, top_k, chosen["deviations"], chosen["spacing"],
            **chosen["shortlist"],
        )  # fmt: skip
        launch(sample_shortlist_kernel, (num_rows,), *inputs, seeds, *shortlist, tokens, *strides, *sizes, **options)
        return tokens
    options["FILTER_TOP_K"] = 0 < top_k < vocabulary
    if chosen["kind"] == "small":
        grid = (triton.cdiv(num_rows, options["ROWS"]),)
        launch(sample_small_kernel, grid, *inputs, seeds, tokens, *strides, num_rows, *sizes, **options)
    else:
        launch(sample_kernel, (num_rows,), *inputs, seeds, tokens, *strides, *sizes, **options)
    return tokens
