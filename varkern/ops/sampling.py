"""Draw M candidate token maps from one read of the logits: guidance, temperature, top-k, nucleus, Philox draws.

Published samplers (``sample_with_top_k_top_p_`` of FoundationVision/VAR) take two sorts and a dozen launches per
candidate. Here each row of logits is filtered once, and every further candidate costs a look-up in its running sum.

Probabilities are fixed-point integers: a token's weight is ``floor(2^44 * exp(x - max))``, with an exponential made
only of IEEE additions and multiplications. Sums of integers do not depend on their order, so the nucleus, its ties and
the running sum are the same to the last bit in PyTorch and in Triton, on a CPU and on a GPU. A token whose probability
is below 2^-44 of the largest probability is never drawn.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from numbers import Real

import torch
from torch import Tensor

from .backend import backend_for
from .philox import TOKENS, check_count, check_seeds, uniform_bits

__all__ = ["sample_tokens"]

MAX_VOCABULARY = 2**18
WEIGHT_BITS = 44  # MAX_VOCABULARY weights of 2^44 sum to 2^62, which int64 holds
TOP_P_BITS = 30
UNIFORM_BITS = 24
_LOG2_E = 1.4426950408889634
_ROUNDER = 1.5 * 2.0**23  # adding it rounds a float32 of small magnitude to an integer, kept in the low bits
# 2^f on [-1/2, 1/2]: minimax in relative error (1.7e-7) with the constant term fixed at 1, so that exp(0) is exact.
_EXP2 = (0.6931470036506653, 0.24022242426872253, 0.05550733581185341, 0.009671512991189957, 0.0013264728477224708)
_CHUNK = {"cpu": 2**17, "cuda": 2**24}  # elements of logits per step: what a core's cache holds; about 500 MB


def sample_tokens(
    logits: Tensor,
    num_candidates: int = 1,
    *,
    uncond_logits: Tensor | None = None,
    guidance: float | Tensor = 0.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 0.0,
    seeds: Tensor,
    scale: int = 0,
) -> Tensor:
    """Draw M token maps, with replacement, from one filtered distribution per position.

    The logits of a row are ``x = ((1 + t)·cond − t·uncond) / temperature`` in float32, where t is the guidance. Then

    1. ``top_k``: tokens below the k-th largest x are dropped; ties with it are kept.
    2. Softmax over the kept tokens.
    3. ``top_p`` (the nucleus): the tokens are ordered by probability, largest first, equal ones by lower index first.
       A token is kept if the mass before it is less than ``top_p`` of the total. The most probable token is always
       kept. Of several tokens that tie at the boundary, those of lowest index are kept.

    The drawn token is the first index v, in vocabulary order, whose running sum of kept probabilities exceeds
    ``u · total``, with u from ``varkern.ops.philox`` at (seed of the image; position, candidate, scale). An image
    therefore depends only on its own seed, and candidates 0..3 of M=8 are the candidates of M=4.

    NaN counts as −inf, +inf as the largest finite float32; −inf is never drawn. A row without any other value gives
    token 0. A token id is always in range.

    Args:
        logits: [B, l, V], float32, bfloat16, float16 or float64 (used as float32), any strides; 1 <= V <= 2^18.
        num_candidates: M >= 1.
        uncond_logits: like ``logits``, for classifier-free guidance; not read if ``guidance`` is the number 0.
        guidance: t, a number, or a float tensor [B] or [B, 1, 1]. ``uncond_logits`` must be given unless it is 0.
        temperature: finite, >= 1e-30.
        top_k: >= 0; 0, or V or more, turns it off.
        top_p: in [0, 1]; 0 or 1 turns it off. Rounded down to a multiple of 2^-30.
        seeds: int64 [B], on the device of ``logits``.
        scale: the autoregressive step, counted from 0; part of the address of the draws.

    Returns:
        Tokens, int64 [B, M, l], in [0, V).

    Raises:
        TypeError, ValueError: an argument is invalid; checked before any work.

    Source: ``sample_with_top_k_top_p_`` and guidance of FoundationVision/VAR; Philox of Salmon et al. 2011.

    Example::

        >>> logits = torch.randn(2, 9, 50)  # two images, a scale of 3 by 3, 50 codes
        >>> tokens = varkern.ops.sample_tokens(logits, 4, top_k=10, top_p=0.9, seeds=varkern.image_seeds(0, 2))
        >>> tokens.shape
        torch.Size([2, 4, 9])
    """
    strengths = _check(logits, num_candidates, uncond_logits, guidance, temperature, top_k, top_p, seeds, scale)
    if isinstance(guidance, Tensor):
        number = 0.0
    else:
        number = float(guidance)
        uncond_logits = uncond_logits if number != 0 else None
    if torch.is_grad_enabled():
        logits = logits.detach()
        uncond_logits = None if uncond_logits is None else uncond_logits.detach()
    options = (number, 1.0 / temperature, int(top_k), float(top_p), int(scale))
    return _op(logits, uncond_logits, strengths, seeds, int(num_candidates), *options)


# ---- Registration and checks ------------------------------------------------------------------------------------

# Defined through a Library and not custom_op, whose wrappers take more host time per call than the launch.
_library = torch.library.Library("varkern", "FRAGMENT")
_library.define(
    "sample_tokens(Tensor logits, Tensor? uncond_logits, Tensor? strengths, Tensor seeds, int num_candidates, "
    "float guidance, float inverse_temperature, int top_k, float top_p, int scale) -> Tensor"
)
_op = torch.ops.varkern.sample_tokens.default


def _sample(logits: Tensor, *arguments) -> Tensor:
    # The backend is chosen here, inside the op, because a context variable cannot be read in a compiled graph.
    if backend_for(logits) == "torch":
        return sample_in_torch(logits, *arguments)
    from ..kernels.sampling import sample  # imported here because triton exists only on Linux

    return sample(logits, *arguments)


def _sample_fake(logits: Tensor, *arguments) -> Tensor:
    batch_size, length, _ = logits.shape
    return logits.new_empty((batch_size, arguments[3], length), dtype=torch.int64)


_library.impl("sample_tokens", _sample, "CompositeExplicitAutograd")
torch.library.register_fake("varkern::sample_tokens", _sample_fake, lib=_library)


def _check(logits, num_candidates, uncond_logits, guidance, temperature, top_k, top_p, seeds, scale) -> Tensor | None:
    """Raise for the first invalid argument. Return a guidance tensor as float32 [B], or None for a number."""
    _check_logits("logits", logits)
    if logits.dim() != 3:
        raise ValueError(f"logits must have shape [B, l, V], got {list(logits.shape)}")
    batch_size, _, vocabulary = logits.shape
    if not 1 <= vocabulary <= MAX_VOCABULARY:
        raise ValueError(f"logits must have a last dimension V in [1, {MAX_VOCABULARY}], got {vocabulary}")
    check_count("num_candidates", num_candidates, 1)
    check_count("top_k", top_k, 0)
    check_count("scale", scale, 0)
    _check_number("top_p", top_p)
    _check_number("temperature", temperature)
    if not 0.0 <= top_p <= 1.0:
        raise ValueError(f"top_p must be in [0, 1], got {top_p}")
    if not (1e-30 <= temperature < math.inf):
        raise ValueError(f"temperature must be finite and >= 1e-30, got {temperature}")
    check_seeds(seeds, batch_size, logits.device)
    if uncond_logits is not None:
        _check_logits("uncond_logits", uncond_logits)
        for name in ("shape", "device"):
            wanted, came = getattr(logits, name), getattr(uncond_logits, name)
            if wanted != came:
                raise ValueError(f"uncond_logits must have the {name} of logits, {wanted}, got {came}")
    return _check_guidance(guidance, batch_size, logits.device, uncond_logits)


def _check_logits(name: str, logits: Tensor) -> None:
    if not isinstance(logits, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(logits).__name__}")
    if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {logits.dtype}")


def _check_number(name: str, number: float) -> None:
    if not isinstance(number, (int, float, Real)):
        raise TypeError(f"{name} must be a number, got {type(number).__name__}")


def _check_guidance(
    guidance: float | Tensor, batch_size: int, device: torch.device, uncond_logits: Tensor | None
) -> Tensor | None:
    if not isinstance(guidance, Tensor):
        _check_number("guidance", guidance)
        if not math.isfinite(guidance):
            raise ValueError(f"guidance must be finite, got {guidance}")
        if guidance != 0 and uncond_logits is None:
            raise ValueError(f"uncond_logits must be given when guidance is {guidance}, got None")
        return None
    if uncond_logits is None:
        raise ValueError("uncond_logits must be given when guidance is a tensor, got None")
    if not guidance.is_floating_point():
        raise TypeError(f"guidance must be a float tensor, got {guidance.dtype}")
    if guidance.shape not in ((batch_size,), (batch_size, 1, 1)):
        raise ValueError(f"guidance must have shape [{batch_size}] or [{batch_size}, 1, 1], got {list(guidance.shape)}")
    if guidance.device != device:
        raise ValueError(f"guidance must be on {device}, got {guidance.device}")
    return guidance.detach().reshape(batch_size).float()


# ---- The plain PyTorch form --------------------------------------------------------------------------------------


@torch.no_grad()
def sample_in_torch(
    logits: Tensor,
    uncond_logits: Tensor | None,
    strengths: Tensor | None,
    seeds: Tensor,
    num_candidates: int,
    guidance: float,
    inverse_temperature: float,
    top_k: int,
    top_p: float,
    scale: int,
) -> Tensor:
    """The PyTorch form: tokens [B, M, l]. ``strengths`` (float32 [B]) replaces ``guidance`` if it is not None."""
    batch_size, length, vocabulary = logits.shape
    bits = uniform_bits(seeds, num_candidates, length, scale, TOKENS)
    bits = bits.transpose(1, 2).reshape(batch_size * length, num_candidates)  # [rows, M]
    if strengths is None and uncond_logits is not None:
        strengths = torch.full((batch_size,), guidance, dtype=torch.float32, device=logits.device)
    if strengths is not None:
        strengths = strengths.repeat_interleave(length)[:, None]  # [rows, 1]
    cond_rows = logits.reshape(-1, vocabulary)
    uncond_rows = None if uncond_logits is None else uncond_logits.reshape(-1, vocabulary)
    parts = []
    for rows in _chunks(batch_size * length, vocabulary, logits.device.type):
        x = cond_rows[rows].float()
        if uncond_rows is not None and strengths is not None:
            x = (1 + strengths[rows]) * x - strengths[rows] * uncond_rows[rows].float()
        if inverse_temperature != 1:
            x = x * inverse_temperature
        x = x.nan_to_num(nan=-math.inf, posinf=torch.finfo(torch.float32).max, neginf=-math.inf)
        parts.append(_sample_rows(x, bits[rows], top_k, top_p))
    tokens = torch.cat(parts) if parts else bits.new_empty(0, num_candidates, dtype=torch.int64)
    tokens = tokens.view(batch_size, length, num_candidates).transpose(1, 2)
    # With one candidate the transposed map is contiguous already, but its strides are not those of a new tensor.
    return tokens.reshape(-1).view(batch_size, num_candidates, length)


def _chunks(num_rows: int, vocabulary: int, device_type: str) -> Iterator[slice]:
    step = max(1, _CHUNK.get(device_type, _CHUNK["cuda"]) // vocabulary)
    for start in range(0, num_rows, step):
        yield slice(start, start + step)


def _weights(x: Tensor, row_max: Tensor) -> Tensor:
    """``floor(2^44 * exp(x - row_max))`` as int64, by operations that round the same everywhere; row_max is finite."""
    y = ((x - row_max) * _LOG2_E).clamp_(min=-64.0)
    shifted = y + _ROUNDER
    fraction = y.sub_(shifted - _ROUNDER)
    power = fraction * _EXP2[-1]
    for coefficient in _EXP2[-2::-1]:
        power.add_(coefficient).mul_(fraction)
    power.add_(1.0)
    exponent = shifted.view(torch.int32).add_(WEIGHT_BITS).bitwise_left_shift_(23)  # only the integer's bits survive
    return power.view(torch.int32).add_(exponent).view(torch.float32).to(torch.int64)


def _scaled(total: Tensor, numerator: Tensor | int, bits: int, round_up: bool = False) -> Tensor:
    """``total * numerator / 2^bits`` exactly, rounded down or up; the product itself would overflow int64."""
    high, low = total >> bits, total & ((1 << bits) - 1)
    return high * numerator + ((low * numerator + ((1 << bits) - 1 if round_up else 0)) >> bits)


def _sample_rows(x: Tensor, bits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Filter rows [R, V] of logits that are finite or -inf, and draw with bits [R, M]. Returns tokens [R, M]."""
    vocabulary = x.shape[1]
    row_max = x.amax(-1, keepdim=True)
    row_max = torch.where(row_max == -math.inf, 0.0, row_max)  # [R, 1], finite
    weights = _weights(x, row_max)  # [R, V]
    kept = _select_tokens(x, row_max, top_k if top_k < vocabulary else 0, top_p if top_p < 1 else 0.0)
    if kept is not None:
        weights = weights.mul_(kept)
    running = weights.cumsum(-1)
    total = running[:, -1:]  # [R, 1]
    wanted = _scaled(total, bits, UNIFORM_BITS).contiguous()
    tokens = torch.searchsorted(running, wanted, right=True)
    return torch.where(total > 0, tokens, 0)


def _select_tokens(x: Tensor, row_max: Tensor, top_k: int, top_p: float) -> Tensor | None:
    """Which tokens of rows [R, V] top-k and nucleus keep, bool [R, V]; None if both are off."""
    nucleus = int(top_p * 2**TOP_P_BITS)  # rounded down: a mass of exactly 0.9 is not below top_p=0.9
    if not top_k and not 0 < top_p < 1:
        return None
    ordered = x.topk(top_k, dim=-1).values if top_k else x.sort(dim=-1, descending=True).values  # [R, k]
    threshold = ordered[:, -1:]
    if not 0 < top_p < 1:
        return x >= threshold
    ordered_weights = _weights(ordered, row_max)
    sums = ordered_weights.cumsum(-1)
    # The number of tokens that tie with the k-th but come after it.
    more = (x >= threshold).sum(-1, keepdim=True) - top_k if top_k else torch.zeros_like(sums[:, :1])
    total = sums[:, -1:] + more * ordered_weights[:, -1:]
    wanted = _scaled(total, nucleus, TOP_P_BITS, round_up=True)  # masses below this are below top_p
    within = sums - ordered_weights < wanted  # [R, k]: true up to some place, then false
    within[:, 0] = True
    num_kept = within.sum(-1, keepdim=True)
    last_weight = ordered_weights[:, -1:].clamp(min=1)
    beyond = ((wanted - sums[:, -1:] + last_weight - 1) // last_weight).clamp_(min=0).minimum(more)
    num_kept = torch.where(within[:, -1:], num_kept + beyond, num_kept)
    boundary = ordered.gather(1, num_kept.clamp(max=ordered.shape[1]) - 1)  # [R, 1]
    ties = x == boundary
    ties_kept = num_kept - (ordered > boundary).sum(-1, keepdim=True)
    return (x > boundary) | (ties & (ties.cumsum(-1, dtype=torch.int32) <= ties_kept))
