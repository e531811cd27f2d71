"""Kernel density written as its definition, in float64 NumPy; and the released VAR-Scaling code's chain in torch."""

import numpy as np
import torch


def as_float64(x):
    return x.detach().cpu().double().numpy()


def squared_distances(x, metric="euclidean"):
    """``[..., N, N]``; for cosine, (1 - cos)^2 with cos 0 between a vector of zeros and any other."""
    if metric == "euclidean":
        return ((x[..., :, None, :] - x[..., None, :, :]) ** 2).sum(-1)
    norms = np.linalg.norm(x, axis=-1, keepdims=True)
    unit = np.divide(x, norms, out=np.zeros_like(x), where=norms > 0)
    apart = 1 - unit @ unit.swapaxes(-1, -2)
    same = (x[..., :, None, :] == x[..., None, :, :]).all(-1)
    return np.where(same, 0, apart) ** 2


def silverman(x, metric="euclidean"):
    """Eq. 3, ``[...]``; for cosine of the samples at unit length."""
    n, d = x.shape[-2:]
    if metric == "cosine":
        norms = np.linalg.norm(x, axis=-1, keepdims=True)
        x = np.divide(x, norms, out=np.zeros_like(x), where=norms > 0)
    return x.std(-2).mean(-1) * (n * (d + 2) / 4) ** (-1 / (d + 4))


def kernel_sums(x, h=None, metric="euclidean"):
    """``[..., N]`` of float64 samples ``[..., N, D]``."""
    h = np.asarray(silverman(x, metric) if h is None else h, dtype=np.float64)[..., None, None]
    squares = squared_distances(x, metric)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(squares == 0, 1.0, np.exp(-squares / (2 * h**2))).sum(-1)


def map_density(codes, per="position", bandwidth="image", metric="euclidean"):
    """``[B, N]`` of float64 ``codes[B, N, l, C]``; bandwidth "image", "batch", a number or ``[B, positions]``."""
    codes = codes.transpose(0, 2, 1, 3) if per == "position" else codes.reshape(*codes.shape[:2], -1)[:, None]
    h = silverman(codes, metric) if isinstance(bandwidth, str) else np.broadcast_to(bandwidth, codes.shape[:2])
    if isinstance(bandwidth, str) and bandwidth == "batch":
        h = np.broadcast_to(h.mean(0), h.shape)
    return kernel_sums(codes, h, metric).sum(1)


def chain(codes):
    """The released code's operations on ``codes[B, N, l, C]``, in its order and in the codes' own precision."""
    batch, n, length, width = codes.shape
    total = torch.zeros(batch, n, dtype=codes.dtype, device=codes.device)
    factor = (n * (width + 2) / 4) ** (-1 / (width + 4))
    for position in range(length):
        x = codes[:, :, position]
        squares = torch.cdist(x, x) ** 2
        h = (factor * x.std(dim=1, unbiased=False)).mean() + 1e-6
        total += torch.exp(-squares / (2 * h**2)).sum(-1)
    return total
