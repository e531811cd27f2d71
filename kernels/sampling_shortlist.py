"""Write the largest logits of a row in vocabulary order. This is the first of the two kernels that share a row.

It writes at least the top_k largest logits and at most a capacity, so a rough threshold is enough. If logits are
normally distributed, the first guess, some standard deviations above the mean, is right, and one count over the row
confirms it. Otherwise the search of ``sampling_search`` continues from there. Bound by bytes: the logits, read once.
"""

import triton
import triton.language as tl

from .sampling_search import (
    COUNT,
    INFINITY,
    LARGEST,
    cleaned,
    extremes,
    load_guided,
    measure_from,
    minus_one_below,
    next_above,
    row_start,
    search,
    tile_columns,
)

HEADER = tl.constexpr(4)


@triton.jit
def quarters(x, GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr):
    """x [GROUPS, GROUP_SIZE] as four vectors [GROUPS * GROUP_SIZE // 4]: columns 4i, 4i + 1, 4i + 2, 4i + 3.

    A thread loads four neighbouring float32 logits together, so storing these vectors needs no exchange between
    threads. Logits in half precision are loaded eight at a time and exchanged once, for a quarter more instructions.
    """
    even, odd = tl.split(tl.reshape(x, [GROUPS * GROUP_SIZE // 2, 2]))
    first, third = tl.split(tl.reshape(even, [GROUPS * GROUP_SIZE // 4, 2]))
    second, fourth = tl.split(tl.reshape(odd, [GROUPS * GROUP_SIZE // 4, 2]))
    return first, second, third, fourth


@triton.jit
def moments(x, vocabulary, GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr):
    """Sum and standard deviation of a row. They only steer a guess, so it does not matter how ``tl.fma`` rounds."""
    first, second, third, fourth = quarters(x, GROUPS, GROUP_SIZE)  # [GROUPS * GROUP_SIZE // 4]
    total = tl.sum((first + second) + (third + fourth))
    squares = tl.sum(tl.fma(first, first, tl.fma(second, second, tl.fma(third, third, fourth * fourth))))
    mean = total / vocabulary
    return total, tl.sqrt(tl.maximum(squares / vocabulary - mean * mean, 0.0))


@triton.jit
def search_shortlist(
    row, x, guess, count, ordinary, top_k,
    GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    """A threshold that selects top_k to CAPACITY logits, or all above -inf if there are fewer, and their number.

    ``count``: the number of logits at or above ``guess``, valid only if the row is ``ordinary``.
    """
    low, largest = extremes(row, x, -LARGEST, INFINITY, GROUPS, GROUP_SIZE, True)
    measure_low = measure_from(row, x, None, 0.0, low, COUNT, GROUPS, GROUP_SIZE, True)
    high = next_above(largest)
    measure_high = 0
    if measure_low > CAPACITY:
        if ordinary & (count > CAPACITY):
            low = guess
            measure_low = count
        if ordinary & (count < top_k) & (guess < high):
            high = guess
            measure_high = count
        low, measure_low, _, _, _ = search(
            row, x, None, 0.0, low, measure_low, high, measure_high, top_k, CAPACITY - top_k, INFINITY,
            COUNT, GROUPS, GROUP_SIZE, True,
        )  # fmt: skip
    return low, measure_low


@triton.jit
def write_from(x, low, values_ptr, columns_ptr, GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr):
    """Store the logits of x [GROUPS, GROUP_SIZE] that are >= ``low``, and their columns, in order."""
    first, second, third, fourth = quarters(x, GROUPS, GROUP_SIZE)  # [GROUPS * GROUP_SIZE // 4]
    below_first = minus_one_below(first, low)
    below_second = minus_one_below(second, low)
    below_third = minus_one_below(third, low)
    below_fourth = minus_one_below(fourth, low)
    of_four = 4 + ((below_first + below_second) + (below_third + below_fourth))
    of_four = tl.reshape(of_four, [GROUPS, GROUP_SIZE // 4])
    of_group = tl.sum(of_four, 1)  # [GROUPS]
    slots = (tl.cumsum(of_group, 0) - of_group)[:, None] + tl.cumsum(of_four, 1) - of_four
    slots = tl.reshape(slots, [GROUPS * GROUP_SIZE // 4])
    columns = (tl.arange(0, GROUPS * GROUP_SIZE // 4) * 4).to(tl.int16)
    tl.store(values_ptr + slots, first, mask=first >= low)
    tl.store(columns_ptr + slots, columns, mask=first >= low)
    slots += below_first + 1
    tl.store(values_ptr + slots, second, mask=second >= low)
    tl.store(columns_ptr + slots, columns + 1, mask=second >= low)
    slots += below_second + 1
    tl.store(values_ptr + slots, third, mask=third >= low)
    tl.store(columns_ptr + slots, columns + 2, mask=third >= low)
    slots += below_third + 1
    tl.store(values_ptr + slots, fourth, mask=fourth >= low)
    tl.store(columns_ptr + slots, columns + 3, mask=fourth >= low)


@triton.jit(do_not_specialize=["length", "vocabulary", "top_k"])
def shortlist_kernel(
    cond_ptr, uncond_ptr, strengths_ptr, headers_ptr, values_ptr, columns_ptr,
    stride_cond_image, stride_cond_position, stride_uncond_image, stride_uncond_position,
    length, vocabulary, guidance, inverse_temperature, top_k, deviations, spacing,
    FULL: tl.constexpr, GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    """Write the largest logits of a row and their columns, in order: at least top_k of them, at most CAPACITY.

    A row's header [HEADER] holds their number (exact in float32), a lower bound of them, and a guess at the top_k-th.
    A number above CAPACITY, which ties can cause, means that no logit was written.
    ``deviations``: the threshold for normally distributed logits, in standard deviations above the mean.
    ``spacing``: the distance from one logit to the next at that threshold, in standard deviations.
    """
    index = tl.program_id(0)
    image = index // length
    position = index % length
    row = (
        row_start(cond_ptr, stride_cond_image, stride_cond_position, image, position),
        None if uncond_ptr is None else row_start(
            uncond_ptr, stride_uncond_image, stride_uncond_position, image, position
        ),
        guidance if strengths_ptr is None else tl.load(strengths_ptr + image),
        inverse_temperature,
        None if FULL else vocabulary,
    )  # fmt: skip
    columns = tile_columns(0, GROUPS, GROUP_SIZE)  # [GROUPS, GROUP_SIZE]
    x = load_guided(row, columns, 0.0)
    total, deviation = moments(x, vocabulary, GROUPS, GROUP_SIZE)
    low = total / vocabulary + deviations * deviation
    ordinary = tl.abs(total) < INFINITY
    if not FULL:
        x = tl.where(columns < vocabulary, x, -INFINITY)
    count = 0
    if ordinary:
        count = measure_from(row, x, None, 0.0, low, COUNT, GROUPS, GROUP_SIZE, True)
    else:
        x = cleaned(x)
    if (count < top_k) | (count > CAPACITY):
        low, count = search_shortlist(row, x, low, count, ordinary, top_k, GROUPS, GROUP_SIZE, CAPACITY)
    if count <= CAPACITY:
        start = index.to(tl.int64) * CAPACITY
        write_from(x, low, values_ptr + start, columns_ptr + start, GROUPS, GROUP_SIZE)
    headers_ptr += index * HEADER
    tl.store(headers_ptr, count.to(tl.float32))
    tl.store(headers_ptr + 1, low)
    tl.store(headers_ptr + 2, low + (count - top_k).to(tl.float32) * (spacing * deviation))
