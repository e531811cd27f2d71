"""Where the random numbers of a generation come from: Philox by image, or the model's own generator."""

from __future__ import annotations

import torch
from torch import Tensor

from varkern.literals import Sampler
from varkern.ops import philox, sample_tokens
from varkern.published import filter_logits, gumbel_softmax, sample_multinomial
from varkern.spec import Logits, Request


class PhiloxDraws:
    """Every number depends only on the image's seed, the scale, the position and the candidate.

    Where an image has several paths, each has a seed: path 0 that of the image, so that it is the image that a
    generation without paths draws, and path j a hash of the image's seed and j. Later a path keeps its seed, and a copy
    of it gets a hash of that seed, the number of the copy and the scale, so that both go on differently.

    Args:
        seeds: the images' seeds, ``[B]`` int64.
    """

    reproduces_upstream = False

    def __init__(self, seeds: Tensor):
        self.seeds = self.image_seeds = seeds

    def keep(self, paths: Tensor, scale: int) -> None:
        """Let rows of the batch, ``[B, n]`` int64, go on at ``scale``, as the session keeps them."""
        earlier = (paths.unsqueeze(2) == paths.unsqueeze(1)).tril(-1).sum(2)  # copies of the same row before each path
        self.seeds = philox.path_seeds(self.seeds[paths], earlier, scale).flatten()

    def selections(self, scale: int, count: int) -> Tensor:
        """Uniform numbers in [0, 1) for a rule that selects paths after ``scale``, ``[B, count]`` float32."""
        return philox.uniforms(self.image_seeds, 1, count, scale, stream=philox.SELECTIONS)[:, 0]

    def labels(self, num_classes: int) -> Tensor:
        """Classes ``[B]`` int64, uniform."""
        uniform = philox.uniforms(self.seeds, 1, 1, 0, stream=philox.LABELS)[:, 0, 0]
        return (uniform.double() * num_classes).long()

    def tokens(self, logits: Logits, scale: int, num_candidates: int) -> Tensor:
        """M independent draws per position, ``[B, M, l]`` int64."""
        return sample_tokens(
            logits.cond,
            num_candidates,
            uncond_logits=logits.uncond,
            guidance=logits.guidance,
            top_k=logits.top_k,
            top_p=logits.top_p,
            seeds=self.seeds,
            scale=scale,
        )

    def picks(self, scale: int, num_candidates: int, draw: int = 0) -> Tensor:
        """One uniform number in [0, 1) per candidate, ``[B, M]`` float32, for a search; each ``draw`` gives others."""
        return philox.uniforms(self.seeds, num_candidates, draw + 1, scale, stream=philox.PICKS)[:, :, draw]

    def steps(self, scale: int, count: int, steps: int) -> Tensor:
        """Uniform numbers in [0, 1) for a search that draws many times, ``[B, count, steps]`` float32."""
        return philox.uniforms(self.seeds, count, steps, scale, stream=philox.STEPS)

    def uniform_tokens(self, scale: int, num_candidates: int, length: int, vocabulary: int) -> Tensor:
        """Tokens ``[B, M, l]`` int64 of which every one is equally probable, whatever a model says."""
        uniform = philox.uniforms(self.seeds, num_candidates, length, scale, stream=philox.UNIFORM_TOKENS)
        return (uniform.double() * vocabulary).long()

    def smoothed(self, logits: Logits, scale: int, sharpen: float, temperature: float) -> Tensor:
        """Weights over the codebook, ``[B, l, V]``: a softmax of filtered, sharpened logits plus Gumbel noise."""
        weights = filter_logits(logits.guided(logits.cond.dtype), logits.top_k, logits.top_p) * sharpen
        length, vocabulary = weights.shape[1:]
        # Image by image, because the words of Philox take many times the memory of the noise.
        for image, seed in zip(weights, self.seeds.split(1), strict=True):
            uniform = philox.uniforms(seed, vocabulary, length, scale, stream=philox.NOISE)[0]
            image.add_(philox.gumbel(uniform.T))
        return (weights / temperature).softmax(-1)


class MultinomialDraws:
    """The published method's own draws, in its order, from a ``torch.Generator`` (None: PyTorch's default)."""

    reproduces_upstream = True

    def __init__(self, generator: torch.Generator | None, batch_size: int, device: torch.device):
        self.generator, self.batch_size, self.device = generator, batch_size, device
        self.num_images = batch_size

    def keep(self, paths: Tensor, scale: int) -> None:
        """See :meth:`PhiloxDraws.keep`; here one generator draws for all rows."""
        self.batch_size = paths.numel()

    def selections(self, scale: int, count: int) -> Tensor:
        return torch.rand(self.num_images, count, device=self.device, generator=self.generator)

    def labels(self, num_classes: int) -> Tensor:
        uniform = torch.full((1, num_classes), 1.0 / num_classes, device=self.device)
        return torch.multinomial(uniform, self.batch_size, replacement=True, generator=self.generator).view(-1)

    def tokens(self, logits: Logits, scale: int, num_candidates: int) -> Tensor:
        filtered = filter_logits(logits.guided(), logits.top_k, logits.top_p)
        return sample_multinomial(filtered, num_candidates, self.generator)

    def picks(self, scale: int, num_candidates: int, draw: int = 0) -> Tensor:
        return torch.rand(self.batch_size, num_candidates, device=self.device, generator=self.generator)

    def steps(self, scale: int, count: int, steps: int) -> Tensor:
        return torch.rand(self.batch_size, count, steps, device=self.device, generator=self.generator)

    def uniform_tokens(self, scale: int, num_candidates: int, length: int, vocabulary: int) -> Tensor:
        shape = (self.batch_size, length, num_candidates)
        return torch.randint(vocabulary, shape, device=self.device, generator=self.generator).transpose(1, 2)

    def smoothed(self, logits: Logits, scale: int, sharpen: float, temperature: float) -> Tensor:
        filtered = filter_logits(logits.guided(), logits.top_k, logits.top_p)
        return gumbel_softmax(filtered * sharpen, temperature, self.generator)


def make_draws(
    sampler: Sampler, request: Request, device: torch.device, generator: torch.Generator | None
) -> PhiloxDraws | MultinomialDraws:
    """The draws of one generation.

    The request has been checked, see :mod:`varkern.checks`.
    """
    if sampler == "multinomial":
        return MultinomialDraws(generator, request.batch_size, device)
    return PhiloxDraws(as_image_seeds(request, device))


def as_image_seeds(request: Request, device: torch.device) -> Tensor:
    """The images' seeds that a request's ``seed`` stands for, ``[B]`` int64 on ``device``."""
    seed = request.seed
    if isinstance(seed, Tensor):
        return seed.to(device=device, dtype=torch.int64)
    if seed is None:
        # From the default generator, so that torch.manual_seed still governs.
        seed = int(torch.randint(2**63 - 1, (), device="cpu").item())
    return philox.image_seeds(int(seed), request.batch_size, device)
