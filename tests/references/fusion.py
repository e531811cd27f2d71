"""F(.) written as its definition, one PyTorch operation after another, and random cases of it."""

import torch
import torch.nn.functional as F

SIDES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
"""The token maps' sides at 256 px, where features are 16 x 16."""


def pair(value):
    return (value, value) if isinstance(value, int) else value


def chain(tokens, codebook, side, size, f_hat=None, phi=None, interpolation="bicubic", dtype=torch.float64):
    """Features ``[B, M, C, H, W]`` of ``tokens[B, M, l]``, every step in ``dtype``."""
    B, M, _ = tokens.shape
    x = F.embedding(tokens.flatten(0, 1), codebook.to(dtype)).transpose(1, 2).unflatten(2, pair(side))
    if pair(side) != pair(size):
        if interpolation == "trilinear":
            x = F.interpolate(x.unsqueeze(2), size=(1, *pair(size)), mode="trilinear").squeeze(2)
        else:
            x = F.interpolate(x, size=pair(size), mode=interpolation)
    if phi is not None:
        weight, bias, blend = phi
        bias = None if bias is None else bias.to(dtype)
        x = x * (1 - blend) + F.conv2d(x, weight.to(dtype), bias, padding=1) * blend
    x = x.unflatten(0, (B, M))
    return x if f_hat is None else x + f_hat.to(dtype).unsqueeze(1)


def relative_error(features, exact):
    return ((features.double() - exact).abs().max() / exact.abs().max()).item()


def case(device, side, size, B=2, M=2, V=97, C=32, seed=0):
    """Random (tokens, codebook, f_hat, phi) on ``device``."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(device)

    tokens = torch.randint(0, V, (B, M, pair(side)[0] * pair(side)[1]), generator=generator).to(device)
    phi = (normal(C, C, 3, 3) / (3 * C**0.5), normal(C), 0.5)
    return tokens, normal(V, C), normal(B, C, *pair(size)), phi
