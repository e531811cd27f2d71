"""Counter-based random numbers: Philox-4x32-10, and the counter layout that every draw of varkern uses.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). The Triton form in
``varkern.kernels.philox`` gives the same words, so a seed gives the same draws on every backend.

A draw depends on its address and not on any order: the key is the image's 64-bit seed, the counter is
(position, candidate, scale, stream). An image therefore does not depend on its place in a batch, and candidate 0 of M=8
is candidate 0 of M=4.
"""

from __future__ import annotations

from numbers import Integral
from typing import Any

import torch

from varkern.ops.backend import backend_for

__all__ = [
    "IMAGE_SEEDS",
    "LABELS",
    "NOISE",
    "PATHS",
    "PICKS",
    "SELECTIONS",
    "STEPS",
    "TOKENS",
    "UNIFORM_TOKENS",
    "gumbel",
    "image_seeds",
    "path_seeds",
    "philox",
    "uniform_bits",
    "uniforms",
]

# The last word of the counter (the stream) gives the purpose of a draw, so that no two purposes share numbers.
TOKENS = 0
LABELS = 1
PICKS = 2
NOISE = 3
IMAGE_SEEDS = 4
UNIFORM_TOKENS = 5
STEPS = 6
PATHS = 7
SELECTIONS = 8

FEW_SEEDS = 16  # up to this number, image seeds are hashed on the host
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF

Word = torch.Tensor | int


def _multiply(constant: int, word: Word) -> tuple[Word, Word]:
    """High and low 32 bits of ``constant * word``. int64 wraps modulo 2^64, which keeps all 64 bits of the product."""
    product = word * constant
    return (product >> 32) & _MASK, product & _MASK


def philox(key_low: Word, key_high: Word, c0: Word, c1: Word, c2: Word, c3: Word) -> tuple[Word, Word, Word, Word]:
    """The four output words of Philox-4x32-10.

    Args:
        key_low, key_high: the two words of the key; int64 tensors or ints in [0, 2^32).
        c0, c1, c2, c3: the words of the counter; int64 tensors or ints in [0, 2^32). All six words broadcast against
            one another. Size 1 in dimensions where a word does not vary is cheaper, because the first rounds are then
            small.

    Returns:
        Four int64 tensors (ints if all arguments are ints) in [0, 2^32).
    """
    for i in range(_ROUNDS):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0 = high1 ^ c1 ^ ((key_low + i * _WEYL[0]) & _MASK)
        c2 = high0 ^ c3 ^ ((key_high + i * _WEYL[1]) & _MASK)
        c1, c3 = low1, low0
    return c0, c1, c2, c3


def check_seeds(seeds: torch.Tensor, batch_size: int | None = None, device: torch.device | None = None) -> None:
    """Raise TypeError or ValueError if ``seeds`` is not an int64 tensor [batch_size] on ``device``."""
    if not isinstance(seeds, torch.Tensor) or seeds.dtype != torch.int64:
        came = seeds.dtype if isinstance(seeds, torch.Tensor) else type(seeds).__name__
        raise TypeError(f"seeds must be an int64 tensor, got {came}")
    if seeds.dim() != 1 or (batch_size is not None and seeds.shape[0] != batch_size):
        wanted = "[B]" if batch_size is None else f"[{batch_size}]"
        raise ValueError(f"seeds must have shape {wanted}, got {list(seeds.shape)}")
    if device is not None and seeds.device != device:
        raise ValueError(f"seeds must be on {device}, got {seeds.device}")


def check_count(name: str, count: int, least: int) -> None:
    """Raise TypeError or ValueError if ``count`` is not an integer of at least ``least``."""
    if isinstance(count, bool) or not isinstance(count, Integral):
        raise TypeError(f"{name} must be an int, got {type(count).__name__}")
    if count < least:
        raise ValueError(f"{name} must be >= {least}, got {count}")


def check_draws(seeds: torch.Tensor, num_candidates: int, num_positions: int, scale: int, stream: int) -> None:
    """Raise TypeError or ValueError for the first argument of :func:`uniforms` that is invalid."""
    check_seeds(seeds)
    for name, count in (
        ("num_candidates", num_candidates),
        ("num_positions", num_positions),
        ("scale", scale),
        ("stream", stream),
    ):
        check_count(name, count, 0)


def uniform_bits(
    seeds: torch.Tensor, num_candidates: int, num_positions: int, scale: int, stream: int = TOKENS
) -> torch.Tensor:
    """The integers that :func:`uniforms` multiplies by 2^-24, int64 [B, M, l] in [0, 2^24)."""
    check_draws(seeds, num_candidates, num_positions, scale, stream)
    keys = seeds[:, None, None]  # [B, 1, 1]
    candidates = torch.arange(num_candidates, device=seeds.device)[None, :, None]  # [1, M, 1]
    positions = torch.arange(num_positions, device=seeds.device)[None, None, :]  # [1, 1, l]
    first: Any = philox(keys & _MASK, (keys >> 32) & _MASK, positions, candidates, scale, stream)[0]
    return first >> 8


def uniforms(
    seeds: torch.Tensor, num_candidates: int, num_positions: int, scale: int, stream: int = TOKENS
) -> torch.Tensor:
    """Uniform numbers that are multiples of 2^-24, one per image, candidate and position.

    Args:
        seeds: int64 [B]. The 64 bits of a seed are used, so a negative number is the same seed as its unsigned value.
        num_candidates: M >= 0.
        num_positions: l >= 0.
        scale: the autoregressive step, counted from 0.
        stream: purpose of the draws: ``TOKENS``, ``LABELS``, ``PICKS``, ``NOISE``, ``UNIFORM_TOKENS``, ``STEPS`` or
            ``SELECTIONS``.

    Returns:
        float32 [B, M, l] in [0, 1): ``(x0 >> 8) * 2^-24``, where x0 is the first word of
        philox(seed, (position, candidate, scale, stream)).

    Raises:
        TypeError, ValueError: an argument is invalid.
    """
    check_draws(seeds, num_candidates, num_positions, scale, stream)
    return _uniforms_op(seeds, int(num_candidates), int(num_positions), int(scale), int(stream))


@torch.library.custom_op("varkern::uniforms", mutates_args=())
def _uniforms_op(seeds: torch.Tensor, num_candidates: int, num_positions: int, scale: int, stream: int) -> torch.Tensor:
    # The PyTorch form takes about 160 launches, too many for the few numbers that a search draws.
    if backend_for(seeds) != "triton" or num_candidates * num_positions >= 2**31:
        return uniform_bits(seeds, num_candidates, num_positions, scale, stream).to(torch.float32) * 2.0**-24
    from varkern.kernels.philox import fill_uniforms

    filled = _empty_uniforms(seeds, num_candidates, num_positions)
    if filled.numel():
        fill_uniforms(seeds, filled, scale, stream)
    return filled


@_uniforms_op.register_fake
def _(seeds, num_candidates, num_positions, scale, stream):
    return _empty_uniforms(seeds, num_candidates, num_positions)


def _empty_uniforms(seeds: torch.Tensor, num_candidates: int, num_positions: int) -> torch.Tensor:
    return seeds.new_empty((seeds.shape[0], num_candidates, num_positions), dtype=torch.float32)


def gumbel(uniform: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise from float32 uniform numbers in [0, 1); finite at both ends."""
    # The largest uniform number, 1 - 2^-24, would round up to 1 here, and its noise would be infinite.
    return -(-(uniform + 2.0**-25).clamp(max=1 - 2.0**-24).log()).log()


def path_seeds(seeds: torch.Tensor, copies: torch.Tensor, scale: int) -> torch.Tensor:
    """Seeds of copies of paths, by a hash of (seed, number of the copy, scale).

    Args:
        seeds: int64, the seeds of the copied paths.
        copies: int64 of the same shape: 0 for a path that goes on, which keeps its seed; 1, 2, ... for its copies.
        scale: the first scale that the copies draw for themselves.

    Returns:
        int64 of the same shape.
    """
    words: Any = philox(seeds & _MASK, (seeds >> 32) & _MASK, copies, 0, scale, PATHS)
    return torch.where(copies == 0, seeds, words[1] << 32 | words[0])


def image_seeds(g_seed: int, batch_size: int, device: torch.device | str | None = None) -> torch.Tensor:
    """B image seeds from one ``g_seed``, by a hash of (g_seed, place in the batch).

    The hash is Philox with ``g_seed`` as key and the place as counter. Batches with neighbouring ``g_seed`` therefore
    share no image (two places have equal seeds with probability 2^-64), and a larger batch starts with the seeds of a
    smaller one.

    Args:
        g_seed: any integer in [-2^63, 2^64).
        batch_size: B >= 0.
        device: device of the result; None for the default device.

    Returns:
        int64 [B].

    Raises:
        TypeError, ValueError: an argument is invalid.

    Example::

        >>> torch.equal(varkern.image_seeds(0, 3)[:2], varkern.image_seeds(0, 2))
        True
    """
    check_count("g_seed", g_seed, -(2**63))
    if g_seed >= 2**64:
        raise ValueError(f"g_seed must be < 2**64, got {g_seed}")
    check_count("batch_size", batch_size, 0)
    key = g_seed & _MASK, (g_seed >> 32) & _MASK
    if batch_size > FEW_SEEDS:
        places = torch.arange(batch_size, device=device)
        words: Any = philox(*key, places & _MASK, places >> 32, 0, IMAGE_SEEDS)
        return words[1] << 32 | words[0]
    # The tensor form takes about a hundred launches. fill_ needs no copy from the host, which might wait.
    seeds = torch.empty(batch_size, dtype=torch.int64, device=device)
    for place in range(batch_size):
        low, high, *_ = philox(*key, place, 0, 0, IMAGE_SEEDS)
        seed = high << 32 | low
        seeds[place].fill_(seed - (seed >> 63 << 64))
    return seeds
