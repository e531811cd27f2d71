"""Where the random numbers of a generation come from: Philox by image, or the model's own generator."""

from __future__ import annotations

import torch
from torch import Tensor

from varkern.ops import philox, sample_tokens
from varkern.ops.multinomial import filter_logits, gumbel_softmax, sample_multinomial
from varkern.spec import Logits, Request

SAMPLERS = ("philox", "multinomial")


class PhiloxDraws:
    """Every number is a function of the image's seed, the scale, the position and the candidate, and of nothing else.

    Args:
        seeds: the images' seeds, ``[B]`` int64.
    """

    reproduces_upstream = False

    def __init__(self, seeds: Tensor):
        self.seeds = seeds

    def labels(self, num_classes: int) -> Tensor:
        """Classes ``[B]`` int64, uniform."""
        uniform = philox.uniforms(self.seeds, 1, 1, 0, stream=philox.LABELS)[:, 0, 0]
        return (uniform.double() * num_classes).long()

    def tokens(self, logits: Logits, request: Request, scale: int, num_candidates: int) -> Tensor:
        """M independent draws a position, ``[B, M, l]`` int64."""
        return sample_tokens(
            logits.cond,
            num_candidates,
            uncond_logits=logits.uncond,
            guidance=logits.guidance,
            top_k=request.top_k,
            top_p=request.top_p,
            seeds=self.seeds,
            scale=scale,
        )

    def picks(self, scale: int, num_candidates: int) -> Tensor:
        """Uniform numbers in [0, 1) for a search, one a candidate, ``[B, M]`` float32."""
        return philox.uniforms(self.seeds, num_candidates, 1, scale, stream=philox.PICKS)[:, :, 0]

    def smoothed(self, logits: Logits, request: Request, scale: int, sharpen: float, temperature: float) -> Tensor:
        """Weights over the codebook, ``[B, l, V]``: a softmax of filtered, sharpened logits plus Gumbel noise."""
        filtered = filter_logits(logits.guided(), request.top_k, request.top_p)
        length, vocabulary = filtered.shape[1:]
        uniform = philox.uniforms(self.seeds, vocabulary, length, scale, stream=philox.NOISE).transpose(1, 2)
        return ((filtered * sharpen + gumbel(uniform)) / temperature).softmax(-1)


class MultinomialDraws:
    """The published method's own draws, in its order, from a ``torch.Generator`` (None: PyTorch's default)."""

    reproduces_upstream = True

    def __init__(self, generator: torch.Generator | None, batch_size: int, device: torch.device):
        self.generator, self.batch_size, self.device = generator, batch_size, device

    def labels(self, num_classes: int) -> Tensor:
        uniform = torch.full((1, num_classes), 1.0 / num_classes, device=self.device)
        return torch.multinomial(uniform, self.batch_size, replacement=True, generator=self.generator).view(-1)

    def tokens(self, logits: Logits, request: Request, scale: int, num_candidates: int) -> Tensor:
        filtered = filter_logits(logits.guided(), request.top_k, request.top_p)
        return sample_multinomial(filtered, num_candidates, self.generator)

    def picks(self, scale: int, num_candidates: int) -> Tensor:
        return torch.rand(self.batch_size, num_candidates, device=self.device, generator=self.generator)

    def smoothed(self, logits: Logits, request: Request, scale: int, sharpen: float, temperature: float) -> Tensor:
        filtered = filter_logits(logits.guided(), request.top_k, request.top_p)
        return gumbel_softmax(filtered * sharpen, temperature, self.generator)


def gumbel(uniform: Tensor) -> Tensor:
    """Standard Gumbel noise from float32 uniform numbers in [0, 1); finite at both ends."""
    # The largest uniform number, 1 - 2^-24, would round up to 1 here, and its noise would be infinite.
    return -(-(uniform + 2.0**-25).clamp(max=1 - 2.0**-24).log()).log()


def make_draws(
    sampler: str, request: Request, device: torch.device, generator: torch.Generator | None
) -> PhiloxDraws | MultinomialDraws:
    """The draws of one generation.

    Raises:
        ValueError: if ``sampler`` is unknown, or the request's seed does not fit it.
    """
    if sampler == "multinomial":
        return MultinomialDraws(generator, request.batch_size, device)
    seed = request.seed
    if isinstance(seed, Tensor):
        return PhiloxDraws(seed.to(device=device, dtype=torch.int64))
    if seed is None:
        # From the default generator, so that torch.manual_seed still governs.
        seed = int(torch.randint(2**63 - 1, ()).item())
    return PhiloxDraws(philox.image_seeds(seed, request.batch_size).to(device))


def check_seed(sampler: str, request: Request) -> None:
    """Raise ``ValueError`` or ``TypeError`` if the request's seed does not fit the sampler."""
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(map(repr, SAMPLERS))}, got {sampler!r}")
    seed = request.seed
    if isinstance(seed, Tensor):
        if sampler == "multinomial":
            raise ValueError("sampler 'multinomial' has one generator for the batch: g_seed must be an int or None")
        if seed.dtype != torch.int64 or seed.shape != (request.batch_size,):
            raise ValueError(
                f"g_seed as a tensor must be int64 of shape [{request.batch_size}], "
                f"got {seed.dtype} of shape {list(seed.shape)}"
            )
    elif seed is not None and (not isinstance(seed, int) or isinstance(seed, bool)):
        raise TypeError(f"g_seed must be an int, a tensor of image seeds or None, got {type(seed).__name__}")
