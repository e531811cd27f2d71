"""The one next-scale loop: every family of models and every search runs through it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any, Generic, Literal, overload

import numpy as np
import torch
from torch import Tensor
from typing_extensions import NamedTuple, TypeVar  # typing's cannot be generic before Python 3.11

from varkern.checks import as_request, check_loop, check_request
from varkern.draws import make_draws
from varkern.exclusive import exclusive
from varkern.families import Family, recognise
from varkern.literals import GenerateLoop, Sampler, check_word
from varkern.path_loop import PathKeeper, PathTree
from varkern.search import Candidates, Search, Steps, as_search, effective_sample_size
from varkern.spec import ModelSpec, Request

Images = TypeVar("Images", bound=Tensor | None, default=Tensor, covariant=True)


class Generation(NamedTuple, Generic[Images]):
    """What :func:`generate` returns, for B images and K scales.

    Example::

        >>> [tuple(tokens.shape) for tokens in varkern.generate(var, labels, seeds=0).tokens]
        [(8, 1), (8, 4), (8, 9), (8, 16), (8, 36)]
    """

    images: Images
    """``[B, 3, H, W]`` in [0, 1]; None with ``decode=False``."""
    tokens: list[Tensor]
    """The kept token map of each scale, ``[B, l]`` int64; for binary codes ``[B, l, d]`` uint8."""
    scores: list[Tensor | Any]  # None is left out of the type, so that what a search scored needs no check
    """The search's scores of all candidates of each scale, ``[B, M]`` float32; None where it did not search. A search
    that composes maps gives the scores of all maps that it scored."""
    choices: list[Tensor | Any]
    """The kept candidate of each scale, ``[B]`` int64; None where there was only one. Where the search composed the
    kept map of several candidates, this is the candidate that it began with, and ``tokens`` has the map."""
    seconds: list[float]
    """The time of each scale, then of decoding: K + 1 numbers, or K with ``decode=False``."""
    steps: list[Steps | Any]
    """What a search that composes maps did step by step, for each scale; None where no such search was used."""
    paths: PathTree | Any = None
    """All paths of a :class:`varkern.PathSearch`; None with another search. The other fields are then those of the path
    that led to each image."""

    def effective_sample_size(self, temperature: float = 1.0) -> list[Tensor | Any]:
        """How many equally weighted maps the candidates of each scale are worth, ``[B]`` each; None without a search.

        It has a meaning for the scores of a scorer. A search that composes maps has one for its whole maps here, and
        ``steps[k].effective_sample_size()`` for its steps.

        Args:
            temperature: of the softmax over scores, as in the search.

        Example::

            >>> result = varkern.generate(var, labels, search=varkern.BestOfM(scorer, m=16, pick="resample"), seeds=0)
            >>> result.effective_sample_size()[3].shape
            torch.Size([8])
        """
        sizes: list[Tensor | None] = []
        for scores, steps in zip(self.scores, self.steps, strict=True):
            if scores is not None and steps is not None:
                scores = scores[:, : scores.shape[1] - steps.scores[:, :, 1:].flatten(1).shape[1]]
            sizes.append(None if scores is None else effective_sample_size(scores, temperature))
        return sizes


def run(
    family: Family,
    model: Any,
    request: Request,
    search: Search | None,
    sampler: Sampler,
    timed: bool = False,
    decode: bool = True,
) -> Generation[Any]:
    """Generate scale by scale and keep one candidate per scale; ``images`` is what the published method returns."""
    spec, device = family.spec(model, request), family.device(model)
    check_request(family, model, spec, request, search, sampler)
    draws = make_draws(sampler, request, device, family.generator(model, request.seed) if sampler != "philox" else None)
    labels = as_labels(request, spec, device, draws) if family.has_classes else request.labels
    clock = Clock(device, timed)
    tokens: list[Tensor] = []
    scores: list[Tensor | None] = []
    choices: list[Tensor | None] = []
    steps: list[Steps | None] = []
    paths = PathKeeper(family, search, spec, labels, request.batch_size)
    session = family.open(model, labels, request, draws)
    try:
        paths.start(session, draws)
        for scale in range(spec.num_scales):
            logits = session.logits(scale)
            m = search.num_candidates(scale, spec.num_scales) if search is not None and logits.free else 1
            candidates = session.maps(scale, draws.tokens(logits, scale, m))  # [B, M, l], or bits [B, M, l, d]
            kept, choice = None, None
            if m > 1 and search is not None:
                choice = search.choose(offer(session, spec, scale, paths.labels, candidates, draws))
                kept = composed(choice, candidates)
                if kept is None:
                    kept = candidates[torch.arange(len(candidates), device=device), choice.index]
            else:
                kept = candidates[:, 0]
            session.commit(scale, kept, logits, draws, hard=m > 1)
            tokens.append(kept)
            scores.append(choice and choice.scores)
            choices.append(choice and choice.index)
            steps.append(getattr(choice, "steps", None))
            paths.select(scale, kept, session, draws)
            clock.tick()
        images = None
        if decode:
            images = session.decode()
            clock.tick()
    finally:
        session.close()
    return paths.of_images(Generation(images, tokens, scores, choices, clock.seconds(), steps))


def offer(session, spec: ModelSpec, scale: int, labels: Any, tokens: Tensor, draws) -> Candidates:
    """The candidates of one scale as a search gets them: features are computed only when it asks for them."""

    def fuse(start: int, stop: int, dtype: torch.dtype | None = None, channels_last: bool = False) -> Tensor:
        return session.fuse(scale, tokens[:, start:stop], dtype, channels_last)

    return Candidates(
        scale,
        spec.num_scales,
        labels,
        tokens,
        fuse,
        partial(draws.picks, scale, tokens.shape[1]),
        session.codebook,
        session.code_scale,
        partial(session.by_position, scale, tokens),
        partial(session.fuse, scale),
        spec.grid(scale),
        partial(draws.steps, scale),
    )


def composed(choice: Any, candidates: Tensor) -> Tensor | None:
    """The maps that a search composed, ``[B, l]`` or bits ``[B, l, d]``; None if it chose among ``candidates``.

    Raises:
        ValueError: if they have another shape or dtype than one candidate of each image.
    """
    tokens = getattr(choice, "tokens", None)
    one = candidates[:, 0]
    if tokens is not None and (tokens.shape != one.shape or tokens.dtype != one.dtype):
        raise ValueError(
            f"a search must return tokens of shape {list(one.shape)} and {one.dtype}, as one candidate of each image, "
            f"got {list(tokens.shape)} and {tokens.dtype}"
        )
    return tokens


def as_labels(request: Request, spec: ModelSpec, device: torch.device, draws) -> Tensor:
    """The request's labels as ``[B]`` int64 on ``device``; if there are none, they are drawn."""
    labels = request.labels
    if labels is None:
        return draws.labels(spec.num_classes)
    assert spec.num_classes is not None, "texts are no labels"
    if not isinstance(labels, Tensor):
        return torch.full((request.batch_size,), spec.num_classes if labels < 0 else int(labels), device=device)
    return labels.to(device=device, dtype=torch.int64)


class Clock:
    """Measures the time between ticks; on a GPU with events, so that nothing waits before the end."""

    def __init__(self, device: torch.device, enabled: bool):
        self.device, self.cuda, self.enabled = device, device.type == "cuda", enabled
        self.marks: list[Any] = []
        self.tick()

    def tick(self) -> None:
        if not self.enabled:
            return
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        if self.cuda and self.marks:
            self.marks[-1].synchronize()
            return [a.elapsed_time(b) / 1e3 for a, b in zip(self.marks, self.marks[1:], strict=False)]
        return [b - a for a, b in zip(self.marks, self.marks[1:], strict=False)]


@overload
def generate(
    model: Any,
    labels: int | Sequence[int] | np.ndarray | Tensor | None,
    *,
    search: Search | Sequence[Search] | None = None,
    seeds: int | Tensor | None = None,
    batch_size: int | None = None,
    cfg: float | Tensor = 1.5,
    top_k: int = 0,
    top_p: float = 0.0,
    sampler: Sampler = "philox",
    decode: Literal[True] = True,
    loop: GenerateLoop = "auto",
    **options: Any,
) -> Generation[Tensor]: ...


@overload
def generate(
    model: Any,
    labels: int | Sequence[int] | np.ndarray | Tensor | None,
    *,
    search: Search | Sequence[Search] | None = None,
    seeds: int | Tensor | None = None,
    batch_size: int | None = None,
    cfg: float | Tensor = 1.5,
    top_k: int = 0,
    top_p: float = 0.0,
    sampler: Sampler = "philox",
    decode: bool,
    loop: GenerateLoop = "auto",
    **options: Any,
) -> Generation[Tensor | None]: ...


@torch.no_grad()
def generate(
    model: Any,
    labels: int | Sequence[int] | np.ndarray | Tensor | None,
    *,
    search: Search | Sequence[Search] | None = None,
    seeds: int | Tensor | None = None,
    batch_size: int | None = None,
    cfg: float | Tensor = 1.5,
    top_k: int = 0,
    top_p: float = 0.0,
    sampler: Sampler = "philox",
    decode: bool = True,
    loop: GenerateLoop = "auto",
    **options: Any,
) -> Generation[Any]:
    """Generate images, and return with them the token maps, the scores of all candidates and the time of each scale.

    Args:
        model: a class-conditional model, VAR or FlexVAR, patched or not; it is not changed.
        labels: classes, ``[B]``; an int for all images (negative: no class); None: drawn at random.
        search: the rule that keeps one candidate, or a :class:`varkern.PathSearch`. In a list of searches, at each
            scale, the first search that asks for more than one candidate is used. None: one candidate per scale.
        seeds: an int, from which :func:`varkern.image_seeds` derives one seed per image; or ``[B]`` int64 image seeds;
            None: a fresh seed from PyTorch's default generator.
        batch_size: B; needed only if neither ``labels`` nor ``seeds`` gives the number of images.
        cfg: strength of guidance at the last scale.
        top_k: keep the k most probable tokens, and those that tie with the last of them; 0: all.
        top_p: of these, keep the most probable tokens up to this probability mass; 0: all.
        sampler: ``"philox"``: each image has its own random numbers, the same in any batch and on any backend.
            ``"multinomial"``: the model's own generator, used as in the published method.
        decode: False: return only the token maps. ``images`` is then None, the decoder does not run, ``seconds`` has
            no number for it, and everything else is the same.
        loop: ``"auto"``: refuse a model whose method is not the published one, because its images may differ;
            ``"fused"``: run varkern's loop on it all the same.
        options: further arguments of the family's published method: ``more_smooth`` for VAR; for FlexVAR ``vqvae`` and
            ``infer_patch_nums``, which it needs, and ``max_pn``, ``used_llamagen_cfg``, ``invalid_ids``.

    Raises:
        UnsupportedModelError: if the model fits no family, or is a text-to-image model (Infinity). Use
            :func:`varkern.patch` for these: their own method turns a text into a condition.
        ValueError, TypeError: if an argument is wrong, before any work.
        RuntimeError: if the model is generating already, in another thread or around this call.

    Example::

        >>> result = varkern.generate(var, labels, search=varkern.BestOfM(scorer, m=4), seeds=0)
        >>> result.images.shape, result.scores[2].shape
        (torch.Size([8, 3, 24, 24]), torch.Size([8, 4]))
    """
    check_word("loop", loop, GenerateLoop)
    family, search = recognise(model), as_search(search)
    sampling = {"seeds": seeds, "batch_size": batch_size, "cfg": cfg, "top_k": top_k, "top_p": top_p, **options}
    if family.has_classes and loop != "fused":
        check_loop(family, model)
    request = as_request(family, model, labels, **sampling)
    with exclusive(family, model):
        made = run(family, model, request, search, sampler, timed=True, decode=decode)
    return made._replace(images=family.images(made.images)) if decode else made
