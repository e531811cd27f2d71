"""Code that the sampling kernels share: fixed-point weights, and the exact search for the two thresholds of a row.

Formulas as in ``varkern.ops.sampling``. A search narrows a bracket of logit values. Each step measures the logits at or
above a pivot, by their number or by the sum of their weights (one compare-and-add over the row, one reduction), and
keeps the side of the bracket that contains the target. Measures are integers, so the search can stop as soon as one
equals its target: the threshold is then exact.

A row is a tuple (cond_ptr, uncond_ptr, strength, inverse_temperature, vocabulary). ``uncond_ptr`` is None without
guidance. ``vocabulary`` is None if the row fills GROUPS * GROUP_SIZE columns; for a shortlist it is the number of its
logits. Every kernel builds the tuple itself, because functions cannot return a tuple with None in Triton 3.6. RESIDENT
rows lie in registers as x (and weights) [GROUPS, GROUP_SIZE]; other rows are read again, tile by tile [1, GROUP_SIZE],
at every step.
"""

import triton
import triton.language as tl

# The PyTorch form has and documents the same constants; a test compares them.
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

# What a search measures of the logits at or above a pivot: their number, or the sum of their weights.
COUNT = tl.constexpr(0)
MASS = tl.constexpr(1)
ROUGH_MASS = tl.constexpr(2)


@triton.jit
def rough_weights(x, shift):
    """``2^44 * exp(x - shift)``, by the same operations as the PyTorch form (compile without fp fusion)."""
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
    return (power.to(tl.int32, bitcast=True) + exponent).to(tl.float32, bitcast=True)


@triton.jit
def fixed_weights(x, shift):
    """``rough_weights`` rounded down to int64. Probabilities are made of these; every backend computes the same."""
    return rough_weights(x, shift).to(tl.int64)


@triton.jit
def scaled(total, numerator, BITS: tl.constexpr, ROUND_UP: tl.constexpr):
    """``total * numerator / 2^BITS`` exactly, rounded down or up; the product itself would overflow int64."""
    high = total >> BITS
    low = (total - (high << BITS)) * numerator
    if ROUND_UP:
        low = -((-low) >> BITS)
    else:
        low = low >> BITS
    return high * numerator + low


@triton.jit
def row_start(pointer, stride_image, stride_position, image, position):
    return pointer + image.to(tl.int64) * stride_image + position.to(tl.int64) * stride_position


@triton.jit
def load_guided(row, columns, beyond):
    """Logits of a row at ``columns`` in float32, guided and tempered, perhaps NaN; past the row's end, ``beyond``."""
    cond_ptr, uncond_ptr, strength, inverse_temperature, vocabulary = row
    if vocabulary is None:
        x = tl.load(cond_ptr + columns).to(tl.float32)
    else:
        x = tl.load(cond_ptr + columns, mask=columns < vocabulary, other=beyond).to(tl.float32)
    if uncond_ptr is not None:
        if vocabulary is None:
            uncond = tl.load(uncond_ptr + columns).to(tl.float32)
        else:
            uncond = tl.load(uncond_ptr + columns, mask=columns < vocabulary, other=0.0).to(tl.float32)
        x = (1.0 + strength) * x - strength * uncond
    if inverse_temperature is not None:
        x = x * inverse_temperature
    return x


@triton.jit
def cleaned(x):
    """Replace NaN by -inf, and +inf by the largest finite float32."""
    return tl.minimum(tl.where(x == x, x, -INFINITY), LARGEST)


@triton.jit
def load_logits(row, columns):
    """Logits of a row at ``columns`` in float32, guided and tempered, without NaN and +inf; -inf past the row's end."""
    return cleaned(load_guided(row, columns, -INFINITY))


@triton.jit
def load_shortlist(row, columns):
    """The logits of a shortlist at ``columns``; -inf past its end, where memory is uninitialised."""
    return tl.where(columns < row[4], tl.load(row[0] + columns), -INFINITY)


@triton.jit
def ordered(x):
    """The bits of a float32 scalar as an int32 that sorts as the float does; ``from_ordered`` is the inverse."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def from_ordered(bits):
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def next_above(x):
    """The next float32 above x. Adding 0.0 turns -0.0 into +0.0: the two compare equal, but their bits differ."""
    return from_ordered(ordered(x + 0.0) + 1)


@triton.jit
def tile_columns(group, TILE_GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr):
    groups = group + tl.arange(0, TILE_GROUPS)[:, None]
    return groups * GROUP_SIZE + tl.arange(0, GROUP_SIZE)[None, :]  # [TILE_GROUPS, GROUP_SIZE]


@triton.jit
def extremes(row, x, low, high, GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr, RESIDENT: tl.constexpr):
    """The smallest logit >= low and the largest logit < high."""
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
def minus_one_below(x, pivot):
    """-1 where x < pivot, otherwise 0: the sign bit of the difference, at half the cost of a comparison.

    ``0.0 - pivot`` is +0.0 for a pivot of either zero, so the difference of any two zeros is +0.0.
    """
    return (x + (0.0 - pivot)).to(tl.int32, bitcast=True) >> 31


@triton.jit
def measure_from(
    row, x, weights, shift, pivot,
    WHAT: tl.constexpr, GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    """Measure the logits at or above a pivot > -inf: their COUNT (int32), MASS (int64) or ROUGH_MASS (float32)."""
    if RESIDENT:
        if WHAT == COUNT:
            measure = GROUPS * GROUP_SIZE + tl.sum(minus_one_below(x, pivot))
        else:
            kept = tl.where(x >= pivot, weights, 0.0)  # [GROUPS, GROUP_SIZE]
            measure = tl.sum(kept.to(tl.int64) if WHAT == MASS else kept)
    else:
        sums = tl.zeros([1, GROUP_SIZE], tl.int32 if WHAT == COUNT else tl.int64)
        for group in range(GROUPS):
            tile = load_logits(row, tile_columns(group, 1, GROUP_SIZE))  # [1, GROUP_SIZE]
            if WHAT == COUNT:
                sums += (tile >= pivot).to(tl.int32)
            else:
                sums += tl.where(tile >= pivot, fixed_weights(tile, shift), 0)
        measure = tl.sum(sums)
    return measure


@triton.jit
def rough_log(x):
    """Natural logarithm of a positive scalar to 0.01, from its exponent and a parabola in its mantissa."""
    bits = x.to(tl.int32, bitcast=True)
    fraction = (bits & 0x7FFFFF).to(tl.float32) * 2.0**-23
    return LN_2 * ((bits >> 23).to(tl.float32) - 127.0 + fraction * (1.34 - 0.34 * fraction))


@triton.jit
def pivot_between(low, high, below, above, steps, WHAT: tl.constexpr):
    """A value strictly between ``low`` and ``high``, if there is a float, where the measure should meet its target.

    A count is assumed to fall linearly in the value, a mass linearly in the value's exponential. If that gives no inner
    point, and at every second step of a long search, the pivot is the midpoint of the two bit patterns, which bounds
    the number of steps.
    """
    ratio = below / (below + above)
    if WHAT == COUNT:
        pivot = low + (high - low) * ratio
    else:
        pivot = high + rough_log(ratio + (1.0 - ratio) * tl.exp(low - high))
    usable = (pivot > low) & (pivot < high) & ((steps < 12) | (steps % 2 == 0))
    if not usable:
        a = ordered(low)
        b = ordered(high)
        pivot = from_ordered((a & b) + ((a ^ b) >> 1))
    return pivot


@triton.jit
def holds_one(difference, low, shift, WHAT: tl.constexpr):
    """Whether a bracket that starts at ``low`` and has the measure ``difference`` can hold only one logit.

    Two logits weigh at least 2·w(low) − 2; the test allows for the rounding of the weights and of this exponential.
    """
    if WHAT == COUNT:
        return difference == 1
    else:
        return (difference > 16) & (difference.to(tl.float32) < 1.4 * 2.0**44 * tl.exp(low - shift))


@triton.jit
def search(
    row, x, weights, shift, low, measure_low, high, measure_high, target, slack, guess,
    WHAT: tl.constexpr, GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    """Find the largest logit v whose measure (all logits >= v) reaches ``target``.

    On entry measure(low) = measure_low >= target > measure_high = measure(high). ``guess`` is the first pivot if it
    lies between low and high. Returns

    - a threshold that selects the same logits as v (with ``slack`` it may select more, of a measure of at most
      target + slack), and its measure;
    - a value above v with no logit between the two, and its measure;
    - whether several logits may equal v.

    The method is regula falsi with Illinois damping; ``pivot_between`` bounds the number of steps. With ROUGH_MASS the
    result is only as exact as float32 sums.
    """
    damp_low = 1.0
    damp_high = 1.0
    side = 0
    steps = 0
    several = 0
    goal = target + slack // 2 if WHAT == COUNT else target
    single = holds_one(measure_low - measure_high, low, shift, WHAT)
    while (measure_low > target + slack) & (several == 0) & (single == 0):
        if (steps & 3 == 3) & (steps > 4):
            smallest, largest = extremes(row, x, low, high, GROUPS, GROUP_SIZE, RESIDENT)
            low = smallest
            high = next_above(largest)
            several = (smallest == largest).to(tl.int32)
        else:
            below = (measure_low - goal).to(tl.float32) * damp_low
            above = (goal - measure_high).to(tl.float32) * damp_high
            pivot = pivot_between(low, high, below, above, steps, WHAT)
            if (steps == 0) & (guess > low) & (guess < high):
                pivot = guess
            measure = measure_from(row, x, weights, shift, pivot, WHAT, GROUPS, GROUP_SIZE, RESIDENT)
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
        single = holds_one(measure_low - measure_high, low, shift, WHAT)
        steps += 1
    return low, measure_low, high, measure_high, several


@triton.jit
def search_mass(
    row, x, weights, shift, low, mass_low, high, target,
    GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    """``search`` for a mass: the threshold, the mass from it on, the mass above it, and whether there may be ties.

    For a resident row a search in float32 runs first, at three fifths of the cost per step. The masses at both ends of
    its bracket are then computed exactly. If rounding misled it, which is rare, the exact search continues from there.
    """
    mass_high = tl.zeros_like(mass_low)
    if RESIDENT:
        rough_low, _, rough_high, _, _ = search(
            row, x, weights, shift, low, mass_low.to(tl.float32), high, tl.zeros_like(shift), target.to(tl.float32),
            0, INFINITY, ROUGH_MASS, GROUPS, GROUP_SIZE, RESIDENT,
        )  # fmt: skip
        from_low = measure_from(row, x, weights, shift, rough_low, MASS, GROUPS, GROUP_SIZE, RESIDENT)
        from_high = measure_from(row, x, weights, shift, rough_high, MASS, GROUPS, GROUP_SIZE, RESIDENT)
        if from_high >= target:
            low = rough_high
            mass_low = from_high
        else:
            high = rough_high
            mass_high = from_high
            if from_low >= target:
                low = rough_low
                mass_low = from_low
            else:
                high = rough_low
                mass_high = from_low
    low, mass_low, _, mass_high, several = search(
        row, x, weights, shift, low, mass_low, high, mass_high, target, 0, INFINITY,
        MASS, GROUPS, GROUP_SIZE, RESIDENT,
    )  # fmt: skip
    return low, mass_low, mass_high, several


@triton.jit
def last_tie(
    row, x, value, num_kept,
    GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    """The column of the ``num_kept``-th logit equal to ``value``: the number of columns with a smaller tie count."""
    if RESIDENT:
        ties = (x == value).to(tl.int32)  # [GROUPS, GROUP_SIZE]
        of_group = tl.sum(ties, 1)  # [GROUPS]
        running = tl.cumsum(ties, 1) + (tl.cumsum(of_group, 0) - of_group)[:, None]
        column = tl.sum((running < num_kept).to(tl.int32))
    else:
        column = tl.zeros_like(num_kept)
        seen = tl.zeros_like(num_kept)
        for group in range(GROUPS):
            ties = (load_logits(row, tile_columns(group, 1, GROUP_SIZE)) == value).to(tl.int32)  # [1, GROUP_SIZE]
            column += tl.sum((seen + tl.cumsum(ties, 1) < num_kept).to(tl.int32))
            seen += tl.sum(ties)
    return column


@triton.jit
def kept_weights(x, columns, weights, threshold, tie):
    """The weights of kept tokens, 0 for others. Logits above the threshold are kept, and ties up to column ``tie``."""
    return tl.where((x > threshold) | ((x == threshold) & (columns <= tie)), weights, 0)


@triton.jit
def filter_row(
    row, x, columns, weights, shift, low, count, high, guess, top_k, nucleus,
    FILTER_TOP_K: tl.constexpr, FILTER_NUCLEUS: tl.constexpr,
    GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    """The threshold and the last kept tie (see ``kept_weights``) of a row whose logits above -inf lie in [low, high).

    ``count``: the number of these logits, if FILTER_TOP_K. ``guess``: the first pivot for the top-k threshold.
    """
    threshold = low
    tie = tl.full([], GROUPS * GROUP_SIZE, tl.int32)
    if FILTER_TOP_K:
        if count > top_k:
            threshold, _, _, _, _ = search(
                row, x, weights, shift, low, count, high, tl.zeros_like(count), top_k, 0, guess,
                COUNT, GROUPS, GROUP_SIZE, RESIDENT,
            )  # fmt: skip
    if FILTER_NUCLEUS:
        total = measure_from(row, x, weights, shift, threshold, MASS, GROUPS, GROUP_SIZE, RESIDENT)
        target = tl.maximum(scaled(total, nucleus, TOP_P_BITS, True), 1)
        if total > target:
            threshold, from_threshold, above, several = search_mass(
                row, x, weights, shift, threshold, total, high, target, GROUPS, GROUP_SIZE, RESIDENT
            )
            if several != 0:
                weight = fixed_weights(threshold, shift)
                wanted = (target - above + weight - 1) // weight
                if wanted * weight < from_threshold - above:
                    tie = last_tie(row, x, threshold, wanted.to(tl.int32), GROUPS, GROUP_SIZE, RESIDENT)
    return threshold, tie
