"""Draw M candidate tokens for every row of logits, reading the row once.

Formula (``varkern.ops.sampling`` states the contract): with ``x = ((1 + t)·cond − t·uncond) / temperature`` keep the
``top_k`` largest x, then the smallest set of most probable tokens whose mass reaches ``top_p``, ties by lower index.
Draw m is the first index whose running sum of kept weights exceeds ``u_m · total``. The kernels replace
``sample_with_top_k_top_p_`` of FoundationVision/VAR, which takes two sorts and five passes over the logits per draw.

``sample_kernel`` runs one program per row and holds the row in registers. A row that is too long for registers is read
again, tile by tile, at every step of a search. If top_k is well below V, two kernels share the work, because a single
one would be bound by the arithmetic of its searches and not by reading the logits. ``shortlist_kernel`` writes a
shortlist in vocabulary order: at least the top_k largest logits, at most a fixed capacity.
``sample_shortlist_kernel`` then filters these exactly and draws. If ties overflow a row's shortlist, the kernel reads
the whole row again.

The second launch is worth its cost. At V=4096, top_k=900, M=1 the two kernels execute 8,500 warp instructions per row
(sm_90, Triton 3.9, 24 rows of normal logits), and the single kernel 31,600: about fourteen search steps run over 1024
logits in one warp instead of 4096 logits in eight warps. The shortlist takes 6 bytes per logit, 4 of which are read
again: 10 kB per row, compared with 32 kB of logits.

Draws use a running sum with two levels: the kernel keeps the sums of GROUPS groups, and reads the group that contains a
draw again, from cache. Bound by bytes: the logits, read once.
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
    """Sums of kept weights up to the end of every group [GROUPS], and the sum over the row."""
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
    """The column of each draw of ``bits`` [DRAWS]: find its group by the running sums, then read that group again."""
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
    """Filter one row, draw and store. For a shortlist, ``tokens_of_columns_ptr`` has the token of each column.

    ``found``: None for a whole row; for a shortlist, a lower bound of its logits and a guess at the top-k threshold.
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
    """``_sample_row`` for a whole row of logits. FULL: GROUPS * GROUP_SIZE equals the vocabulary."""
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
    """Sample from whole rows. One program per row, with the index ``image * length + position``."""
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
    """Filter and draw from the shortlists of ``shortlist_kernel``. One program per row."""
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
    """Launch parameters: which kernels run, and their compile-time sizes.

    "small": compares all pairs of tokens, up to V=32. "row": one program per row. "shortlist": two kernels, chosen if
    some power of two is at least 17/16 of top_k and at most half the padded row. A thread holds 32 logits, or 16 logits
    and their weights if several warps share a row. With many draws groups are short, so that finding a draw is cheap.
    """
    draws = 1 if num_candidates == 1 else 4 if num_candidates <= 4 else 16
    block = triton.next_power_of_2(vocabulary)
    if vocabulary <= LARGEST_SMALL:
        rows = max(1, min(512, 2048 // (block * block)))  # at V=1 more than 512 rows would not fit into registers
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
    """Launch the kernels. Arguments and result as in ``varkern.ops.sampling.sample_in_torch``; the op checks them."""
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
