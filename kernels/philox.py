"""Philox-4x32-10 in a kernel, with varkern's counter layout.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). The PyTorch form in
``varkern.ops.philox`` gives the same words. Bound by integer multiplications, 20 wide ones per four words; for the few
numbers that a search draws, bound by the launch.
"""

import torch
import triton
import triton.language as tl

from .launching import launch

BLOCK = 256


@triton.jit
def philox_uniform_bits(seed, position, candidate, scale, STREAM: tl.constexpr):
    """The top 24 bits of the first word of philox(seed, (position, candidate, scale, stream)), as int64.

    seed: int64 scalar; position, candidate, scale: integer scalars or tensors that broadcast.
    """
    # tl.cast, not .to(): Triton turns an argument that equals 1 into a compile-time constant, which has no methods.
    zero = tl.zeros_like(candidate).to(tl.uint32)
    c0 = zero + tl.cast(position, tl.uint32)
    c2 = zero + tl.cast(scale, tl.uint32)
    first, _, _, _ = tl.philox(seed, c0, tl.cast(candidate, tl.uint32), c2, zero + STREAM)
    return (first >> 8).to(tl.int64)


@triton.jit
def uniforms_kernel(
    seeds_ptr, uniforms_ptr, places, length, scale, stride_seeds, STREAM: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK], candidate by candidate
    seed = tl.load(seeds_ptr + image * stride_seeds)
    bits = philox_uniform_bits(seed, place % length, place // length, scale, STREAM)
    tl.store(uniforms_ptr + image * places + place, bits.to(tl.float32) * (1.0 / 16777216), mask=place < places)


def fill_uniforms(seeds: torch.Tensor, uniforms: torch.Tensor, scale: int, stream: int) -> None:
    """Write the uniform numbers of ``seeds[B]`` int64 into ``uniforms[B, M, l]``, float32, contiguous, not empty."""
    batch_size, num_candidates, length = uniforms.shape
    places = num_candidates * length
    grid = (batch_size, triton.cdiv(places, BLOCK))
    sizes = (places, length, scale, seeds.stride(0))
    launch(uniforms_kernel, grid, seeds, uniforms, *sizes, STREAM=stream, BLOCK=BLOCK, num_warps=4)
