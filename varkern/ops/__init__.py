"""One file an operation: its contract, its checks, its plain PyTorch form, its dispatch."""

from .backend import use_backend
from .fusion import commit_tokens, fuse_tokens, resize_features
from .philox import image_seeds
from .sampling import SampleStats, sample_tokens

__all__ = [
    "SampleStats",
    "commit_tokens",
    "fuse_tokens",
    "image_seeds",
    "resize_features",
    "sample_tokens",
    "use_backend",
]
