"""Draw tokens from rows so short that comparing all pairs of tokens is the cheapest way, such as bits (V=2).

The formulas are those of ``varkern.ops.sampling``, computed literally: a token's rank and the mass before it are sums
over the row. Bound by bytes for V=2, and by the V² comparisons per row near V=32.
"""

import triton
import triton.language as tl

from .philox import philox_uniform_bits
from .sampling_search import INFINITY, TOP_P_BITS, UNIFORM_BITS, fixed_weights, load_logits, row_start, scaled

TOKENS = tl.constexpr(0)


@triton.jit(do_not_specialize=["num_rows", "length", "vocabulary", "num_candidates", "scale", "top_k", "nucleus"])
def sample_small_kernel(
    cond_ptr, uncond_ptr, strengths_ptr, seeds_ptr, tokens_ptr,
    stride_cond_image, stride_cond_position, stride_uncond_image, stride_uncond_position,
    num_rows, length, vocabulary, num_candidates, scale, guidance, inverse_temperature, top_k, nucleus,
    FILTER_TOP_K: tl.constexpr, FILTER_NUCLEUS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sample from whole rows, ROWS per program."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    inside = rows < num_rows
    rows = tl.where(inside, rows, 0)
    image = (rows // length).to(tl.int64)
    position = (rows % length).to(tl.int64)
    columns = tl.arange(0, BLOCK)[None, :]  # [1, BLOCK]
    row = (
        row_start(cond_ptr, stride_cond_image, stride_cond_position, image, position)[:, None],
        None if uncond_ptr is None else row_start(
            uncond_ptr, stride_uncond_image, stride_uncond_position, image, position
        )[:, None],
        guidance if strengths_ptr is None else tl.load(strengths_ptr + image)[:, None],
        inverse_temperature,
        vocabulary,
    )  # fmt: skip
    x = load_logits(row, columns)  # [ROWS, BLOCK]
    largest = tl.max(x, 1)
    shift = tl.where(largest == -INFINITY, 0.0, largest)  # [ROWS]
    weights = fixed_weights(x, shift[:, None])
    kept = x > -INFINITY
    above = x[:, None, :] > x[:, :, None]  # [ROWS, BLOCK, BLOCK]: last axis's token is above the middle axis's token
    if FILTER_TOP_K:
        kept = kept & (tl.sum(above.to(tl.int32), 2) < top_k)
    if FILTER_NUCLEUS:
        survivors = tl.where(kept, weights, 0)
        target = tl.maximum(scaled(tl.sum(survivors, 1), nucleus, TOP_P_BITS, True), 1)
        earlier = (x[:, None, :] == x[:, :, None]) & (columns[:, None, :] < tl.arange(0, BLOCK)[None, :, None])
        kept = kept & (tl.sum(tl.where(above | earlier, survivors[:, None, :], 0), 2) < target[:, None])
    survivors = tl.where(kept, weights, 0)
    running = tl.cumsum(survivors, 1)  # [ROWS, BLOCK]
    total = tl.sum(survivors, 1)  # [ROWS]
    seeds = tl.load(seeds_ptr + image)
    for candidate in range(num_candidates):
        bits = philox_uniform_bits(seeds, position, tl.full([ROWS], candidate, tl.int32), scale, TOKENS)  # [ROWS]
        wanted = scaled(total, bits, UNIFORM_BITS, False)
        tokens = tl.sum((running <= wanted[:, None]).to(tl.int32), 1)
        tokens = tl.where(total > 0, tokens, 0)
        places = (image * num_candidates + candidate) * length + position
        tl.store(tokens_ptr + places, tokens.to(tl.int64), mask=inside)
