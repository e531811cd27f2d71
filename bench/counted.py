"""The calls whose instructions ``bench/compiled.py`` counts: each op at the published sizes, with few units of work."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from varkern import ops
from varkern.ops import philox


def cases() -> Iterator[tuple[str, str, int, Callable[[], object]]]:
    """Yield name, unit of work, number of units, and the call."""
    yield from sampling()
    yield from fusion()
    yield from density()
    yield from norms()
    yield from keeping()
    yield "uniforms, B=4, M=128", "number", 512, lambda: philox.uniforms(torch.arange(4), 128, 1, 0)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sampling():
    x, u, seeds = normal(2, 4, 4096) * 2.5, normal(2, 4, 4096, seed=1) * 2.5, torch.arange(2)
    guided = {"uncond_logits": u, "guidance": 1.5, "seeds": seeds}
    both, nucleus = {"top_k": 900, "top_p": 0.96}, {"top_p": 0.96}
    for m in (1, 4, 128):
        yield f"sample, V=4096, top-k and top-p, M={m}", "row", 8, lambda m=m: ops.sample_tokens(x, m, **guided, **both)
    half = {**guided, "uncond_logits": u.bfloat16()}
    yield "sample, V=4096, bfloat16, M=1", "row", 8, lambda: ops.sample_tokens(x.bfloat16(), 1, **half, **both)
    yield "sample, V=4096, top-p, M=1", "row", 8, lambda: ops.sample_tokens(x, 1, **guided, **nucleus)
    yield "sample, V=4096, no filter, M=128", "row", 8, lambda: ops.sample_tokens(x, 128, **guided)
    b = normal(2, 512, 2)
    bits = {"uncond_logits": normal(2, 512, 2, seed=1), "guidance": 3.0, "top_k": 900, "top_p": 0.97, "seeds": seeds}
    for m in (1, 16):
        yield f"sample, V=2, M={m}", "row", 1024, lambda m=m: ops.sample_tokens(b, m, **bits)


def fusion():
    codebook, phi = normal(4096, 32), (normal(32, 32, 3, 3) * 0.1, normal(32), 0.5)
    f_hat, maps = normal(1, 32, 16, 16), 4
    for dtype in (torch.bfloat16, torch.float32):
        options = {
            "size": (16, 16),
            "f_hat": f_hat,
            "phi": phi,
            "dtype": dtype,
            "channels_last": dtype != torch.float32,
        }
        for side in (1, 5, 13, 16):
            tokens = torch.randint(0, 4096, (1, maps, side * side), generator=torch.Generator().manual_seed(side))
            name = f"F, {side} to 16, C=32, {str(dtype).removeprefix('torch.')}"
            call = lambda t=tokens, s=side, o=options: ops.fuse_tokens(t, codebook, side=s, **o)  # noqa: E731
            yield name, "map", maps, call
    for side in (1, 13):
        yield f"next input, 16 to {side}", "image", 1, lambda side=side: ops.resize_features(f_hat, size=side)


def density():
    codebook = normal(4096, 32)
    for n, length, per in ((100, 4, "position"), (100, 16, "map")):
        tokens = torch.randint(0, 4096, (1, n, length), generator=torch.Generator().manual_seed(n))
        call = lambda t=tokens, per=per: ops.token_density(t, codebook, per=per)  # noqa: E731
        yield f"density, N={n}, l={length}, per {per}", "pair and position", n * n * length, call
    bits = torch.rand(1, 100, 16, 32, generator=torch.Generator().manual_seed(0)) < 0.5
    yield "density of bits, N=100, l=16, d=32", "pair and position", 100 * 100 * 16, lambda: ops.bit_density(bits, 1.0)
    x = normal(1, 520, 32)
    yield "density, N=520, D=32", "pair", 520 * 520, lambda: ops.kernel_density(x)


def keeping():
    for length in (25, 256):
        kept, maps = torch.zeros(4, length, dtype=torch.int64), torch.ones(4, 8, length, dtype=torch.int64)
        score, scores, noise = normal(4), normal(4, 8, seed=1), normal(4, 9, seed=2)
        call = lambda given=(kept, score, maps, scores), noise=noise: ops.keep_maps(*given, noise=noise)  # noqa: E731
        yield f"keep a map, P=8, l={length}", "image", 4, call


def norms():
    maps, options = 4, {"negative_slope": 0.2}
    for channels, side in ((64, 8), (128, 4), (256, 2)):
        shape = (channels, side, side)
        weight, bias = (normal(*shape, seed=seed).requires_grad_() for seed in (1, 2))
        x, residual = (normal(maps, *shape, seed=seed) for seed in (0, 3))
        half = [t.bfloat16().contiguous(memory_format=torch.channels_last) for t in (x, residual)]

        def forward(x=half[0], residual=half[1], weight=weight, bias=bias):
            with torch.no_grad():
                ops.map_norm(x, weight, bias, residual=residual, **options)

        def both(x=x, residual=residual, weight=weight, bias=bias):
            x = x.detach().requires_grad_()
            ops.map_norm(x, weight, bias, residual=residual, **options).sum().backward()

        name = f"norm, C={channels}, {side} x {side}"
        yield f"{name}, bfloat16", "map", maps, forward
        yield f"{name}, float32, with backward", "map", maps, both
