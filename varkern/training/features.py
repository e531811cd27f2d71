"""The features on which a scorer is trained, computed from the token ids of each batch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from varkern.models.quantizer import VectorQuantizer
from varkern.ops import fuse_tokens

Phi = tuple[Tensor, "Tensor | None", float]
FEATURES = ("fused", "own")


class FeatureMaker:
    """Computes the scorer's input at each scale from the tokens of all scales.

    ``"fused"`` features are ``e_k = F(r_0 .. r_k)``, the sum of all scales up to k, as for VAR (LSRS, section 3.3).
    ``"own"`` features are the codes of scale k resized to the latent size, without sum or phi. The paper uses them for
    FlexVAR (appendix A), where every scale's codes are the whole image at a lower resolution. A search computes the
    same features.

    Args:
        codebook: ``[V, C]``.
        phis: ``(weight, bias, blend)`` per scale, or None for no phi.
        patch_nums: the side of each scale; features have the side of the last scale.
        features: ``"fused"`` or ``"own"``.
    """

    def __init__(self, codebook: Tensor, phis: Sequence[Phi | None], patch_nums: Sequence[int], features: str):
        if features not in FEATURES:
            raise ValueError(f"features must be one of {', '.join(map(repr, FEATURES))}, got {features!r}")
        self.codebook, self.phis, self.patch_nums, self.features = codebook, list(phis), tuple(patch_nums), features
        self.lengths = [side * side for side in self.patch_nums]

    @classmethod
    def of_quantizer(cls, quantizer: VectorQuantizer) -> FeatureMaker:
        """Make ``"fused"`` features with a VQ-VAE's quantizer, on its device."""
        phis = [as_phi(quantizer.phi(scale)) for scale in range(len(quantizer.v_patch_nums))]
        return cls(quantizer.embedding.weight.detach(), phis, quantizer.v_patch_nums, "fused")

    @classmethod
    def of_codebook(cls, codebook: Tensor, patch_nums: Sequence[int]) -> FeatureMaker:
        """Make ``"own"`` features with a codebook ``[V, C]``, whose codes are scaled to length 1 as in FlexVAR."""
        codebook = F.normalize(codebook.detach().float(), dim=-1)
        return cls(codebook, [None] * len(patch_nums), patch_nums, "own")

    def to(self, device: torch.device) -> FeatureMaker:
        """Return a copy on ``device``."""
        phis = [
            phi and (phi[0].to(device), phi[1] if phi[1] is None else phi[1].to(device), phi[2]) for phi in self.phis
        ]
        return FeatureMaker(self.codebook.to(device), phis, self.patch_nums, self.features)

    def fingerprint(self) -> str:
        """Hash everything that the features depend on."""
        digest = hashlib.sha256(repr((self.features, self.patch_nums)).encode())
        tensors = [self.codebook, *(tensor for phi in self.phis if phi for tensor in phi[:2] if tensor is not None)]
        for tensor in tensors:
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    @torch.no_grad()
    def __call__(self, tokens: Tensor, first_scale: int = 0) -> Tensor:
        """Compute features ``[n, K - first_scale, C, H, W]`` float32 from tokens ``[n, L]`` int64 of all scales."""
        size, channels = self.patch_nums[-1], self.codebook.shape[1]
        scales = len(self.patch_nums)
        features = torch.empty(len(tokens), scales - first_scale, channels, size, size, device=tokens.device)
        f_hat = None
        for scale, ids in enumerate(tokens.split(self.lengths, dim=1)):
            if self.features == "own" and scale < first_scale:
                continue
            fused = fuse_tokens(
                ids.unsqueeze(1),
                self.codebook,
                side=self.patch_nums[scale],
                size=size,
                f_hat=f_hat,
                phi=self.phis[scale],
            )[:, 0]
            if self.features == "fused":
                f_hat = fused
            if scale >= first_scale:
                features[:, scale - first_scale] = fused
        return features


def as_phi(layer: nn.Module) -> Phi | None:
    """Convert a phi layer of the quantizer to the form that ``fuse_tokens`` takes."""
    if isinstance(layer, nn.Identity):
        return None
    return layer.weight.detach(), None if layer.bias is None else layer.bias.detach(), layer.resi_ratio
