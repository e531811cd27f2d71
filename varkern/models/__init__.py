"""VAR, its multi-scale VQ-VAE, and functions that load the published checkpoints."""

from .loading import load_vae, load_var
from .var import PATCH_NUMS_256, PATCH_NUMS_512, VAR
from .vqvae import VQVAE

__all__ = ["PATCH_NUMS_256", "PATCH_NUMS_512", "VAR", "VQVAE", "load_vae", "load_var"]
