"""What the sampling kernels share: fixed-point weights, and the exact search for the two thresholds of a row.

Formulas as in ``varkern.ops.sampling``. A threshold is found by narrowing a bracket of logits: each step counts, or
weighs, the logits from a pivot up (one compare-and-add over the row, one reduction) and keeps the side that holds the
target. What is measured is an integer, so a bracket whose measure meets the target is exact and the search stops there.

A row is a tuple (cond_ptr, uncond_ptr, strength, inverse_temperature, vocabulary): ``uncond_ptr`` None without
guidance, ``vocabulary`` None if GROUPS * GROUP_SIZE columns are all there. RESIDENT rows lie in registers as x (and
weights) [GROUPS, GROUP_SIZE]; others are read again, tile by tile [1, GROUP_SIZE], at every step.
"""

import triton
import triton.language as tl

# Shared with the PyTorch form, which documents them; a test holds the two equal.
WEIGHT_BITS = tl.constexpr(44)
TOP_P_BITS = tl.constexpr(30)
UNIFORM_BITS = tl.constexpr(24)
LOG2_E = tl.constexpr(1.4426950408889634)
ROUNDER = tl.constexpr(12582912.0)
EXP2_1 = tl.constexpr(0.6931470036506653)
EXP2_2 = tl.constexpr(0.24022242426872253)
EXP2_3 = tl.constexpr(0.05550733581185341)
EXP2_4 = tl.constexpr(0.009671512991189957)
EXP2_5 = tl.constexpr(0.0013264728477224708)

INFINITY = tl.constexpr(float("inf"))
LARGEST = tl.constexpr(3.4028234663852886e38)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def fixed_weights(x, shift):
    """``floor(2^44 * exp(x - shift))`` as int64, by the operations of the PyTorch form (compile without fp fusion)."""
    y = tl.maximum((x - shift) * LOG2_E, -64.0)
    rounded = y + ROUNDER
    fraction = y - (rounded - ROUNDER)
    power = fraction * EXP2_5
    power = (power + EXP2_4) * fraction
    power = (power + EXP2_3) * fraction
    power = (power + EXP2_2) * fraction
    power = (power + EXP2_1) * fraction
    power = power + 1.0
    exponent = (rounded.to(tl.int32, bitcast=True) + WEIGHT_BITS) << 23
    return (power.to(tl.int32, bitcast=True) + exponent).to(tl.float32, bitcast=True).to(tl.int64)


@triton.jit
def scaled(total, numerator, BITS: tl.constexpr, ROUND_UP: tl.constexpr):
    """``total * numerator / 2^BITS`` exactly, rounded down or up; the product itself would leave int64."""
    high = total >> BITS
    low = (total - (high << BITS)) * numerator
    if ROUND_UP:
        low = -((-low) >> BITS)
    else:
        low = low >> BITS
    return high * numerator + low


@triton.jit
def load_logits(row, columns):
    """Guided, tempered float32 logits of a row at ``columns``: never NaN, never +inf; -inf beyond the vocabulary."""
    cond_ptr, uncond_ptr, strength, inverse_temperature, vocabulary = row
    if vocabulary is None:
        x = tl.load(cond_ptr + columns).to(tl.float32)
    else:
        x = tl.load(cond_ptr + columns, mask=columns < vocabulary, other=-INFINITY).to(tl.float32)
    if uncond_ptr is not None:
        if vocabulary is None:
            uncond = tl.load(uncond_ptr + columns).to(tl.float32)
        else:
            uncond = tl.load(uncond_ptr + columns, mask=columns < vocabulary, other=0.0).to(tl.float32)
        x = (1.0 + strength) * x - strength * uncond
    x = x * inverse_temperature
    return tl.minimum(tl.where(x == x, x, -INFINITY), LARGEST)


@triton.jit
def ordered(x):
    """A float32 scalar's bits as an int32 that orders as the float does (an involution, see ``from_ordered``)."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def from_ordered(bits):
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def next_above(x):
    """The next float32; adding 0.0 makes -0.0 +0.0, which compares equal but would stand below it as bits."""
    return from_ordered(ordered(x + 0.0) + 1)


@triton.jit
def tile_columns(group, TILE_GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr):
    groups = group + tl.arange(0, TILE_GROUPS)[:, None]
    return groups * GROUP_SIZE + tl.arange(0, GROUP_SIZE)[None, :]  # [TILE_GROUPS, GROUP_SIZE]


@triton.jit
def extremes(row, x, low, high, GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr, RESIDENT: tl.constexpr):
    """Smallest and largest logit in [low, high)."""
    if RESIDENT:
        smallest = tl.min(tl.where(x >= low, x, INFINITY))
        largest = tl.max(tl.where(x < high, x, -INFINITY))
    else:
        least = tl.full([1, GROUP_SIZE], INFINITY, tl.float32)
        most = tl.full([1, GROUP_SIZE], -INFINITY, tl.float32)
        for group in range(GROUPS):
            tile = load_logits(row, tile_columns(group, 1, GROUP_SIZE))  # [1, GROUP_SIZE]
            least = tl.minimum(least, tl.where(tile >= low, tile, INFINITY))
            most = tl.maximum(most, tl.where(tile < high, tile, -INFINITY))
        smallest = tl.min(least)
        largest = tl.max(most)
    return smallest, largest


@triton.jit
def measure_from(
    row, x, weights, shift, pivot,
    COUNT: tl.constexpr, GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    """How many logits are at or above the pivot (int32), or their weights' sum (int64)."""
    if RESIDENT:
        if COUNT:
            measure = tl.sum((x >= pivot).to(tl.int32))
        else:
            measure = tl.sum(tl.where(x >= pivot, weights, 0))
    else:
        sums = tl.zeros([1, GROUP_SIZE], tl.int32 if COUNT else tl.int64)
        for group in range(GROUPS):
            tile = load_logits(row, tile_columns(group, 1, GROUP_SIZE))  # [1, GROUP_SIZE]
            if COUNT:
                sums += (tile >= pivot).to(tl.int32)
            else:
                sums += tl.where(tile >= pivot, fixed_weights(tile, shift), 0)
        measure = tl.sum(sums)
    return measure


@triton.jit
def pivot_between(low, high, below, above, steps, COUNT: tl.constexpr):
    """A value strictly between ``low`` and ``high`` where the measure should meet its target, if floats leave one.

    A count is taken to fall linearly in the value, a mass in the value's exponential. Where that gives no inner point,
    and at every other step once a search is long, the middle of the floats' bit patterns bounds the number of steps.
    """
    ratio = below / (below + above)
    if COUNT:
        pivot = low + (high - low) * ratio
    else:
        pivot = high + tl.log(ratio + (1.0 - ratio) * tl.exp(low - high))
    usable = (pivot > low) & (pivot < high) & ((steps < 12) | (steps % 2 == 0))
    if not usable:
        a = ordered(low)
        b = ordered(high)
        pivot = from_ordered((a & b) + ((a ^ b) >> 1))
    return pivot


@triton.jit
def holds_one(difference, low, shift, COUNT: tl.constexpr):
    """Whether a bracket from ``low`` up, whose measure is ``difference``, can hold one logit only.

    Two weigh at least 2·w(low) − 2; the test leaves room for the rounding of the weights and of this exponential.
    """
    if COUNT:
        return difference == 1
    else:
        return (difference > 16) & (difference.to(tl.float32) < 1.4 * 2.0**44 * tl.exp(low - shift))


@triton.jit
def search(
    row, x, weights, shift, low, measure_low, high, target, slack, guess,
    COUNT: tl.constexpr, GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    """Find the largest logit v whose measure (all logits >= v) reaches ``target``.

    On entry measure(low) = measure_low >= target > 0, no logit is at or above high, and ``guess`` is the first pivot if
    it lies between. Returns a threshold in place of v (the logits in [threshold, v) are none, or with ``slack`` so many
    that the measure from the threshold on is at most target + slack), the measures from the threshold on and above v,
    and whether logits equal to v may be several. Regula falsi with Illinois damping; ``pivot_between`` bounds how long.
    """
    measure_high = tl.zeros_like(measure_low)
    damp_low = 1.0
    damp_high = 1.0
    side = 0
    steps = 0
    several = 0
    goal = target + slack // 2
    searching = measure_low > target + slack
    while searching:
        if (steps & 3 == 3) & (steps > 4):
            smallest, largest = extremes(row, x, low, high, GROUPS, GROUP_SIZE, RESIDENT)
            low = smallest
            high = next_above(largest)
            several = (smallest == largest).to(tl.int32)
        else:
            below = (measure_low - goal).to(tl.float32) * damp_low
            above = (goal - measure_high).to(tl.float32) * damp_high
            pivot = pivot_between(low, high, below, above, steps, COUNT)
            if (steps == 0) & (guess > low) & (guess < high):
                pivot = guess
            measure = measure_from(row, x, weights, shift, pivot, COUNT, GROUPS, GROUP_SIZE, RESIDENT)
            if measure >= target:
                low = pivot
                measure_low = measure
                damp_high = tl.where(side == 1, damp_high * 0.5, 1.0)
                damp_low = 1.0
                side = 1
            else:
                high = pivot
                measure_high = measure
                damp_low = tl.where(side == 2, damp_low * 0.5, 1.0)
                damp_high = 1.0
                side = 2
        single = holds_one(measure_low - measure_high, low, shift, COUNT)
        searching = (measure_low > target + slack) & (several == 0) & (single == 0)
        steps += 1
    return low, measure_low, measure_high, several


@triton.jit
def last_tie(
    row, x, columns, value, num_kept,
    GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    """The column of the ``num_kept``-th logit equal to ``value``, by bisection over the columns."""
    first = tl.zeros_like(num_kept)
    last = first + GROUPS * GROUP_SIZE - 1
    while first < last:
        middle = (first + last) // 2
        if RESIDENT:
            ties = tl.sum(((x == value) & (columns <= middle)).to(tl.int32))
        else:
            sums = tl.zeros([1, GROUP_SIZE], tl.int32)
            for group in range(GROUPS):
                of_tile = tile_columns(group, 1, GROUP_SIZE)
                tile = load_logits(row, of_tile)  # [1, GROUP_SIZE]
                sums += ((tile == value) & (of_tile <= middle)).to(tl.int32)
            ties = tl.sum(sums)
        if ties >= num_kept:
            last = middle
        else:
            first = middle + 1
    return first


@triton.jit
def kept_weights(x, columns, weights, threshold, tie):
    """The weights of the tokens that stay: above the threshold, or equal to it and not beyond the last tie kept."""
    return tl.where((x > threshold) | ((x == threshold) & (columns <= tie)), weights, 0)


@triton.jit
def filter_row(
    row, x, columns, weights, shift, low, high, top_k, nucleus,
    FILTER_TOP_K: tl.constexpr, FILTER_NUCLEUS: tl.constexpr,
    GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    """The threshold and the last tie (see ``kept_weights``) of a row whose logits above -inf lie in [low, high)."""
    threshold = low
    tie = tl.full([], GROUPS * GROUP_SIZE, tl.int64)
    if FILTER_TOP_K:
        count = measure_from(row, x, weights, shift, low, True, GROUPS, GROUP_SIZE, RESIDENT)
        if count > top_k:
            threshold, _, _, _ = search(
                row, x, weights, shift, low, count, high, top_k, 0, INFINITY, True, GROUPS, GROUP_SIZE, RESIDENT
            )
    if FILTER_NUCLEUS:
        total = measure_from(row, x, weights, shift, threshold, False, GROUPS, GROUP_SIZE, RESIDENT)
        target = tl.maximum(scaled(total, nucleus, TOP_P_BITS, True), 1)
        if total > target:
            threshold, from_threshold, above, several = search(
                row, x, weights, shift, threshold, total, high, target, 0, INFINITY,
                False, GROUPS, GROUP_SIZE, RESIDENT,
            )  # fmt: skip
            if several != 0:
                weight = fixed_weights(threshold, shift)
                wanted = (target - above + weight - 1) // weight
                if wanted * weight < from_threshold - above:
                    tie = last_tie(row, x, columns, threshold, wanted, GROUPS, GROUP_SIZE, RESIDENT)
    return threshold, tie


@triton.jit
def log_of(weight):
    """Natural logarithm of a fixed-point sum of weights; NaN for an empty row's."""
    return tl.where(weight > 0, tl.log(weight.to(tl.float32)) - WEIGHT_BITS * LN_2, float("nan"))
