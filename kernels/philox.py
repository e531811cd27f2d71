"""Philox-4x32-10 in a kernel, with varkern's counter layout.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). The PyTorch form, which
gives the same words, is ``varkern.ops.philox``. Bound by integer multiplications: 20 wide ones for four words.
"""

import triton
import triton.language as tl


@triton.jit
def philox_uniform_bits(seed, position, candidate, scale, STREAM: tl.constexpr):
    """The top 24 bits of the first word of philox(seed, (position, candidate, scale, stream)), as int64.

    seed: int64 scalar; position, candidate, scale: integer scalars or tensors that broadcast.
    """
    zero = tl.zeros_like(candidate).to(tl.uint32)
    c0 = zero + position.to(tl.uint32)
    c2 = zero + scale.to(tl.uint32)
    first, _, _, _ = tl.philox(seed, c0, candidate.to(tl.uint32), c2, zero + STREAM)
    return (first >> 8).to(tl.int64)
