"""Search over paths: several paths of one image run together, and rules say which go on (TTS-VAR)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from varkern.literals import PathRule, check_word
from varkern.spec import ModelSpec, is_int

from .base import Candidates, Choice, Scorer, Search, check_highest_label, check_model
from .combined import as_search
from .path_rules import RULES, Paths, Rule, Top
from .scorers import as_wanted, call_scorer, check_scorer, describe_scorer, move_to
from .scoring import check_scorer_fits, check_scorer_knows

Reward = Callable[[Any, Tensor, int], Any]
"""``(condition, images[N, 3, H, W] in [0, 1], scale) -> rewards[N]``, higher is better. If the object has a true
attribute ``on_features``, it gets fused features ``[N, C, H, W]`` in place of images, and nothing is decoded for it."""


class PathSearch:
    """Run several paths of each image together, drop some at some scales, and keep one image (TTS-VAR).

    A path is one prefix of token maps. All paths of all images are one batch. After the scales in ``select``, a rule
    says which paths of each image go on: some end, some are copied, and their KV caches, features and conditions follow
    them. A copy draws other tokens than its source from then on. The method of a patched model still returns one image
    per label or text; ``varkern.generate`` also returns the tree of all paths, see :class:`varkern.PathTree`.

    Path 0 has the image's own random numbers, so without a rule that drops it, it is the image that the model gives
    without paths, and the paths of a smaller search are the first ones of a larger search.

    Source: Chen et al., "TTS-VAR: A Test-Time Scaling Framework for Visual Auto-Regressive Generation"
    (arXiv 2507.18537). As published for 13 scales: ``paths=(8, 8, 6, 6, 6, 4, 2, 2, 2, 1, 1, 1, 1)``, ``select={2:
    "cluster", 5: "cluster", 6: "resample", 9: "resample"}``. The released code draws a scale with the paths that the
    scale before left, and so does this search. It draws paths with replacement independently, where
    :class:`varkern.search.Resample` is systematic.

    Args:
        paths: the number of paths of each image that go on after each scale, one number per scale; the first scale is
            drawn by the first number of paths. After the last scale one path is kept, so the last number must be 1 or
            the one before it. An int: this number at every scale.
        select: for scales, counted from 0, the rule that selects: ``"resample"``, ``"cluster"``, ``"top"``, an object
            of the classes :class:`varkern.search.Resample`, :class:`varkern.search.Cluster`,
            :class:`varkern.search.Top`, or any callable :data:`varkern.search.Rule`. It must have every scale after
            which ``paths`` changes. None: only the last scale. If several paths are left after the last scale and it
            has no rule, ``"top"`` selects.
        reward: a callable ``(condition, images, scale) -> rewards``, higher is better. ``condition`` is the labels
            ``[N]`` int64, or the text condition of N texts that the model's method takes. ``images`` are decoded from
            the maps up to ``scale``, ``[N, 3, H, W]`` in [0, 1], on the model's device. ``rewards`` is a tensor or a
            list of N numbers. N is the number of all paths of the batch; the paths of an image are together. It is
            called only at scales whose rule asks for it. :class:`varkern.LogRatio` makes a reward of a scorer; it takes
            fused features, so nothing is decoded. So does any callable with a true attribute ``on_features``.
        features: a callable with the same arguments that returns features ``[N, ...]`` for ``"cluster"``, such as those
            of DINOv2 as published. None: the fused features themselves.
        search: a search, or a list of searches, that chooses the token maps inside each path, such as
            :class:`varkern.BestOfM`.
        images_at_once: the most images that are decoded at a time for rewards and features.

    Raises:
        ValueError, TypeError: if an argument is wrong.

    Example::

        >>> search = varkern.PathSearch((4, 4, 4, 2, 1), {3: "resample", 4: "top"}, reward=varkern.LogRatio(scorer))
        >>> result = varkern.generate(var, labels, search=search, seeds=0)
        >>> [survivors.shape[1] for survivors in result.paths.survivors]
        [4, 4, 4, 2, 1]
        >>> result.images.shape
        torch.Size([8, 3, 24, 24])
    """

    paths: int | tuple[int, ...]
    select: dict[int, Rule]
    reward: Reward | None
    features: Reward | None
    search: Search | None
    images_at_once: int

    def __init__(
        self,
        paths: int | Sequence[int],
        select: Mapping[int, PathRule | Rule] | None = None,
        reward: Reward | None = None,
        features: Reward | None = None,
        search: Search | Sequence[Search] | None = None,
        *,
        images_at_once: int = 64,
    ):
        counts = (paths,) if is_int(paths) else paths
        if not isinstance(counts, Sequence) or isinstance(counts, str) or not counts:
            raise TypeError(f"paths must be an int or a sequence with a number for each scale, got {paths!r}")
        for number in counts:
            if not is_int(number) or number < 1:
                raise ValueError(f"paths must be >= 1, got {number!r}")
        if not is_int(images_at_once) or images_at_once < 1:
            raise ValueError(f"images_at_once must be an int >= 1, got {images_at_once!r}")
        for name, function in (("reward", reward), ("features", features)):
            if function is not None and (not callable(function) or isinstance(function, type)):
                raise TypeError(f"{name} must be a callable object (condition, images, scale), got {function!r}")
        self.paths: int | tuple[int, ...] = int(paths) if is_int(paths) else tuple(int(number) for number in counts)
        self.select = {scale: as_rule(scale, rule) for scale, rule in as_select(select).items()}
        self.reward, self.features, self.images_at_once = reward, features, images_at_once
        self.search = as_search(search)
        if isinstance(self.search, PathSearch):
            raise TypeError("search must be a search inside each path, such as varkern.BestOfM, got a PathSearch")
        for scale, rule in self.select.items():
            if reward is None and getattr(rule, "needs_reward", False):
                raise ValueError(f"reward must be given for the rule {rule!r} of scale {scale}, got none")

    @classmethod
    def best_of_n(cls, n: int, reward: Reward, search: Search | Sequence[Search] | None = None) -> PathSearch:
        """Best-of-N over finished images: N paths that nothing drops, of which the image with the highest reward stays.

        Args:
            n: N >= 1.
            reward, search: as for :class:`PathSearch`.

        Raises:
            ValueError, TypeError: if an argument is wrong.

        Example::

            >>> search = varkern.PathSearch.best_of_n(4, reward=lambda condition, images, scale: images.mean((1, 2, 3)))
            >>> varkern.generate(var, labels, search=search, seeds=0).paths.rewards[4].shape
            torch.Size([8, 4])
        """
        if not is_int(n) or n < 1:
            raise ValueError(f"n must be an int >= 1, got {n!r}")
        return cls(n, None, reward, search=search)

    def __repr__(self) -> str:
        settings = [f"paths={self.paths}", f"select={self.select}"]
        for name in ("reward", "features"):
            if getattr(self, name) is not None:
                settings.append(f"{name}={describe_function(getattr(self, name))}")
        settings += [] if self.search is None else [f"search={self.search!r}"]
        return f"PathSearch({', '.join(settings)})"

    def num_paths(self, scale: int, num_scales: int) -> int:
        """The number of paths that draw ``scale``."""
        return self.paths if isinstance(self.paths, int) else self.paths[max(scale - 1, 0)]

    def num_kept(self, scale: int, num_scales: int) -> int:
        """The number of paths that go on after ``scale``; one after the last."""
        if scale == num_scales - 1:
            return 1
        return self.paths if isinstance(self.paths, int) else self.paths[scale]

    def rule(self, scale: int, num_scales: int) -> Rule | None:
        """The rule that selects after ``scale``; None: all paths go on."""
        if self.num_paths(scale, num_scales) == self.num_kept(scale, num_scales) == 1:
            return None
        return self.select.get(scale, Top() if scale == num_scales - 1 else None)

    def check(self, spec: ModelSpec) -> None:
        """See :class:`.base.Search`."""
        count = spec.num_scales
        if not isinstance(self.paths, int):
            if len(self.paths) != count:
                raise ValueError(f"paths must have one number for each of {count} scales, got {len(self.paths)}")
            if self.paths[-1] not in (1, self.num_paths(count - 1, count)):
                raise ValueError(
                    f"paths must end in 1 or in {self.num_paths(count - 1, count)}, the number of paths that draw the "
                    f"last scale, because one image is kept of them, got {self.paths[-1]}"
                )
        for scale in self.select:
            if scale >= count:
                raise ValueError(f"select must have scales < {count}, the model's scales, got {scale}")
        for scale in range(count):
            self.check_scale(scale, count)
        if self.search is not None:
            check_model(self.search, spec)
        for function in (self.reward, self.features):
            check_model(function, spec)

    def check_scale(self, scale: int, num_scales: int) -> None:
        """Raise ``ValueError`` if the number of paths changes after a scale without a rule that can change it so."""
        before, after = self.num_paths(scale, num_scales), self.num_kept(scale, num_scales)
        rule = self.rule(scale, num_scales)
        if rule is None and before != after:
            raise ValueError(
                f"select must have a rule for scale {scale}, after which paths changes from {before} to {after}"
            )
        if after > before and not getattr(rule, "copies", True):
            raise ValueError(
                f"paths must not grow after scale {scale}, whose rule {rule!r} copies no paths, got {before}, {after}"
            )
        if rule is not None and self.reward is None and getattr(rule, "needs_reward", False):
            raise ValueError(f"reward must be given to keep one of {before} paths after the last scale, got none")

    def check_labels(self, highest: int, spec: ModelSpec) -> None:
        """See :class:`.base.Search`."""
        for part in (self.search, self.reward, self.features):
            check_highest_label(part, highest, spec)

    def num_candidates(self, scale: int, num_scales: int) -> int:
        """See :class:`.base.Search`; of the search inside each path."""
        return 1 if self.search is None else self.search.num_candidates(scale, num_scales)

    def choose(self, candidates: Candidates) -> Choice:
        """See :class:`.base.Search`; of the search inside each path."""
        assert self.search is not None, "the loop asks only where num_candidates is above 1"
        return self.search.choose(candidates)


class LogRatio:
    """A scorer as a reward of :class:`varkern.PathSearch`: the score of the fused features of each path.

    An exact scorer estimates ``log p_real(e | c, k) - log p_model(e | c, k)`` up to a constant, see
    :class:`varkern.BestOfM`. Resampling of paths by the difference of this reward, with ``strength=1``, is therefore
    sequential Monte Carlo towards the distribution of real images. Nothing is decoded.

    Args:
        scorer: as for :class:`varkern.BestOfM`.

    Raises:
        TypeError: if it is not a scorer.

    Example::

        >>> reward = varkern.LogRatio(scorer)
        >>> reward(labels, torch.randn(8, 16, 6, 6), 2).shape
        torch.Size([8])
    """

    on_features = True

    def __init__(self, scorer: Scorer):
        check_scorer(scorer)
        self.scorer = scorer

    def __repr__(self) -> str:
        return f"LogRatio({describe_scorer(self.scorer)})"

    def check(self, spec: ModelSpec) -> None:
        """See :class:`.base.Search`."""
        check_scorer_fits(self.scorer, spec)

    def check_labels(self, highest: int, spec: ModelSpec) -> None:
        """See :class:`.base.Search`."""
        check_scorer_knows(self.scorer, highest, spec)

    def __call__(self, condition: Any, features: Tensor, scale: int) -> Tensor:
        """Scores ``[N]`` float32 of features ``[N, C, H, W]``."""
        move_to(self.scorer, features.device)
        return call_scorer(self.scorer, condition, as_wanted(self.scorer, features.unsqueeze(1)), scale)[:, 0].float()


def as_select(select: object) -> dict[int, Any]:
    """The scales and rules of the argument ``select``.

    Raises:
        TypeError, ValueError: if it is not a mapping from scales.
    """
    if select is None:
        return {}
    if not isinstance(select, Mapping):
        raise TypeError(f"select must be a dict from scales to rules, got {select!r}")
    for scale in select:
        if not is_int(scale) or scale < 0:
            raise ValueError(f"select must have scales >= 0, counted from 0, got {scale!r}")
    return {int(scale): rule for scale, rule in select.items()}


def as_rule(scale: int, rule: Any) -> Rule:
    """A rule of the argument ``select``: a word, or a callable object, which is returned unchanged."""
    if isinstance(rule, str):
        check_word(f"select[{scale}]", rule, PathRule)
        return RULES[rule]()
    found: Any = rule
    if not callable(rule) or isinstance(rule, type):
        raise TypeError(f"select[{scale}] must be a rule such as 'resample', or a callable (paths), got {rule!r}")
    return found


def describe_function(function: object) -> str:
    """How a reward is shown: an object by its repr, a function by its name."""
    return getattr(function, "__name__", None) or repr(function)


def check_selected(selected: object, paths: Paths, batch_size: int) -> Tensor:
    """The paths that a rule selected, ``[B, n']`` int64.

    Raises:
        TypeError, ValueError: if they are not such paths. On a GPU their values are not read, because that would wait.
    """
    wanted = f"a rule of select must return an int64 tensor of shape {[batch_size, paths.num_kept]}"
    if not isinstance(selected, Tensor):
        raise TypeError(f"{wanted}, got {type(selected).__name__}")
    if selected.shape != (batch_size, paths.num_kept) or selected.dtype != torch.int64:
        raise ValueError(f"{wanted}, got {selected.dtype} of shape {list(selected.shape)}")
    if selected.device.type == "cpu" and not ((selected >= 0) & (selected < paths.num_paths)).all():
        raise ValueError(f"a rule of select must return paths in 0..{paths.num_paths - 1}, got {selected.tolist()}")
    return selected
