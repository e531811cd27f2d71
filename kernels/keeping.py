"""Keep one of several maps of every image: the first map with the highest sum of score and noise.

    j* = argmax over j of  (score_j / temperature + noise_j),     kept' = map_{j*},    score' = score_{j*}

Source: the Gumbel-max trick, by which this is a draw with probability softmax(score / temperature). Map 0 is the map
kept so far, which lies elsewhere than the others. Every program repeats the few comparisons of its image and copies a
part of the map. Bound by the launch: an image reads and writes one map of at most some kilobytes.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launching import launch

BLOCK = 1024  # numbers of a map that a program copies


@triton.jit
def keep_maps_kernel(
    kept_ptr, score_ptr, maps_ptr, scores_ptr, noise_ptr, out_ptr, out_score_ptr, picked_ptr,
    temperature, P, L,
    stride_kept_b, stride_score_b, stride_maps_b, stride_maps_p, stride_scores_b, stride_scores_p,
    stride_noise_b, stride_noise_p,
    BLOCK_P: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    number = tl.arange(0, BLOCK_P)  # 0: the map kept so far
    fresh = (number > 0) & (number <= P)
    scores = tl.load(
        scores_ptr + image * stride_scores_b + (number - 1) * stride_scores_p, mask=fresh, other=float("-inf")
    )  # [BLOCK_P]
    scores = tl.where(number == 0, tl.load(score_ptr + image * stride_score_b), scores)
    sums = scores
    if noise_ptr is not None:
        noise = tl.load(noise_ptr + image * stride_noise_b + number * stride_noise_p, mask=number <= P, other=0.0)
        sums = tl.div_rn(scores, temperature) + noise
    picked = tl.argmax(sums, axis=0)  # of equal sums the first

    place = tl.program_id(1) * BLOCK_L + tl.arange(0, BLOCK_L)
    old = tl.load(kept_ptr + image * stride_kept_b + place, mask=(place < L) & (picked == 0), other=0)
    map_ptr = maps_ptr + image * stride_maps_b + (picked - 1).to(tl.int64) * stride_maps_p
    new = tl.load(map_ptr + place, mask=(place < L) & (picked > 0), other=0)
    tl.store(out_ptr + image * L + place, tl.where(picked == 0, old, new), mask=place < L)
    if tl.program_id(1) == 0:
        tl.store(out_score_ptr + image, tl.sum(tl.where(number == picked, scores, 0.0), axis=0))
        tl.store(picked_ptr + image, picked.to(tl.int64))


def keep_maps(
    kept: Tensor,
    score: Tensor,
    maps: Tensor,
    scores: Tensor,
    noise: Tensor | None,
    temperature: float,
    out: Tensor,
    out_score: Tensor,
    picked: Tensor,
) -> None:
    """Fill ``out[B, L]``, ``out_score[B]`` and ``picked[B]`` (int64); neither B nor L is 0.

    Arguments:
        kept, maps: ``[B, L]`` and ``[B, P, L]`` of one integer type; their last axis is dense.
        score, scores: float32 ``[B]`` and ``[B, P]``.
        noise: float32 ``[B, P + 1]``, that of ``kept`` first; None: the highest score itself decides.
    """
    B, P, L = maps.shape
    launch(
        keep_maps_kernel, (B, triton.cdiv(L, BLOCK)),
        kept, score, maps, scores, noise, out, out_score, picked,
        temperature, P, L, kept.stride(0), score.stride(0), maps.stride(0), maps.stride(1), *scores.stride(),
        *((0, 0) if noise is None else noise.stride()),
        BLOCK_P=max(2, triton.next_power_of_2(P + 1)), BLOCK_L=min(BLOCK, triton.next_power_of_2(L)),
        num_warps=4,
    )  # fmt: skip
