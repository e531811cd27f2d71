"""The operations of varkern. One file per operation has its contract, checks, plain PyTorch form and dispatch."""

from .backend import use_backend
from .density import bit_density, kernel_density, silverman_bandwidth, token_density
from .fusion import commit_tokens, fuse_tokens, resize_features
from .keeping import Kept, keep_maps
from .norm import map_norm
from .philox import image_seeds
from .sampling import sample_tokens

__all__ = [
    "Kept",
    "bit_density",
    "commit_tokens",
    "fuse_tokens",
    "image_seeds",
    "keep_maps",
    "kernel_density",
    "map_norm",
    "resize_features",
    "sample_tokens",
    "silverman_bandwidth",
    "token_density",
    "use_backend",
]
