"""The paths of one generation: forked before the first scale, selected after scales, and the tree that they make."""

from __future__ import annotations

from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from varkern.families import Family, Session
from varkern.search import Paths, PathSearch, Search
from varkern.search.diagnostics import Steps
from varkern.search.paths import Reward, check_selected
from varkern.spec import ModelSpec


class PathTree(NamedTuple):
    """All paths of a generation with :class:`varkern.PathSearch`, for B images and K scales.

    ``n_k`` is the number of paths of each image that drew scale k. A path is known by its place among these.

    Example::

        >>> search = varkern.PathSearch((4, 2, 2, 2, 1), {1: "cluster", 4: "top"}, reward=varkern.LogRatio(scorer))
        >>> tree = varkern.generate(var, labels, search=search, seeds=0).paths
        >>> [tuple(survivors.shape) for survivors in tree.survivors]
        [(8, 4), (8, 2), (8, 2), (8, 2), (8, 1)]
        >>> [rewards is None for rewards in tree.rewards], tree.tokens[4].shape
        ([True, True, True, True, False], torch.Size([8, 2, 36]))
    """

    tokens: list[Tensor]
    """The token map of every path of each scale, ``[B, n_k, l]`` int64; for binary codes ``[B, n_k, l, d]`` uint8."""
    rewards: list[Tensor | Any]
    """The rewards after each scale, ``[B, n_k]`` float32; None where no rule asked for them."""
    survivors: list[Tensor]
    """Which of the paths of each scale went on, ``[B, n]`` int64 in 0..n_k - 1; after the last scale the one of the
    image, ``[B, 1]``. Path j of scale k + 1 goes on from path ``survivors[k][:, j]`` of scale k."""

    def ancestors(self) -> list[Tensor]:
        """The path of each scale that leads to the image, ``[B]`` int64 each.

        Example::

            >>> search = varkern.PathSearch.best_of_n(4, reward=varkern.LogRatio(scorer))
            >>> result = varkern.generate(var, labels, search=search, seeds=0)
            >>> best = result.paths.rewards[4].argmax(1)
            >>> all(torch.equal(ancestor, best) for ancestor in result.paths.ancestors())
            True
        """
        found, index = [], torch.zeros_like(self.survivors[-1])
        for survivors in reversed(self.survivors):
            index = survivors.gather(1, index)
            found.append(index[:, 0])
        return found[::-1]


class PathKeeper:
    """Follows the paths of one generation. Without a :class:`.PathSearch` it does nothing.

    Args:
        family, search, spec: as :func:`varkern.generation.run` has them.
        labels: of the images, ``[B]`` int64, or a text condition.
        batch_size: B.
    """

    def __init__(self, family: Family, search: Search | None, spec: ModelSpec, labels: Any, batch_size: int):
        self.family, self.num_scales, self.labels = family, spec.num_scales, labels
        self.search = search if isinstance(search, PathSearch) else None
        self.images, self.batch_size, self.device = labels, batch_size, spec.device
        self.tree = PathTree([], [], [])
        self.history: list[Tensor] = []  # rewards of the ancestors of each path, [B, n] float64

    def start(self, session: Session, draws: Any) -> None:
        """Fork every image into its first paths."""
        if self.search is not None:
            rows = torch.arange(self.batch_size, device=self.device).unsqueeze(1)
            self.keep(rows.expand(-1, self.search.num_paths(0, self.num_scales)), 0, session, draws)

    def select(self, scale: int, kept: Tensor, session: Session, draws: Any) -> None:
        """Let the paths go on that the rule of ``scale`` selects.

        Args:
            kept: the token maps that the paths kept at ``scale``, ``[B * n, l]`` or bits ``[B * n, l, d]``.
        """
        if self.search is None:
            return
        num_paths = self.search.num_paths(scale, self.num_scales)
        rule = self.search.rule(scale, self.num_scales)
        self.tree.tokens.append(kept.unflatten(0, (self.batch_size, num_paths)))
        self.tree.rewards.append(None)
        if rule is None:
            every = torch.arange(num_paths, device=self.device)
            self.tree.survivors.append(every.expand(self.batch_size, -1))
            return
        if self.batch_size == 0:  # nothing to reward
            selected = torch.zeros(
                0, self.search.num_kept(scale, self.num_scales), dtype=torch.int64, device=self.device
            )
        else:
            paths = self.offer(scale, num_paths, session, draws)
            selected = check_selected(rule(paths), paths, self.batch_size)
        rewards = self.tree.rewards[scale]
        history = self.history if rewards is None else [*self.history, rewards]
        self.history = [row.gather(1, selected) for row in history]
        self.tree.rewards[scale] = None if rewards is None else rewards.float()
        self.tree.survivors.append(selected)
        first = torch.arange(self.batch_size, device=self.device).unsqueeze(1) * num_paths
        self.keep(first + selected, scale + 1, session, draws)

    def keep(self, rows: Tensor, scale: int, session: Session, draws: Any) -> None:
        """Let these rows of the batch, ``[B, n]``, go on at ``scale``."""
        session.keep(rows, finished=scale == self.num_scales)
        draws.keep(rows, scale)
        self.labels = self.family.repeat(self.images, rows.shape[1])

    def offer(self, scale: int, num_paths: int, session: Session, draws: Any) -> Paths:
        """The paths as a rule gets them: rewards and features are computed when it asks for them, and only once."""
        search, shape = self.search, (self.batch_size, num_paths)
        assert search is not None, "there are paths"

        @cache
        def states(on_features: bool) -> Tensor:
            if on_features:
                return session.features(scale)
            count, step = self.batch_size * num_paths, search.images_at_once
            slices = [slice(start, min(start + step, count)) for start in range(0, count, step)]
            return torch.cat([session.image(scale, rows) for rows in slices])

        def values(function: Reward, name: str) -> Tensor:
            state = states(bool(getattr(function, "on_features", False)))
            found = torch.as_tensor(function(self.labels, state, scale), device=self.device)
            if found.dim() < 1 or len(found) != len(state) or (name == "reward" and found.dim() > 1):
                wanted = [len(state)] if name == "reward" else f"[{len(state)}, ...]"
                raise ValueError(f"{name} must return values of shape {wanted}, got {list(found.shape)}")
            return found.double().unflatten(0, shape)

        @cache
        def rewards() -> Tensor:
            if search.reward is None:
                raise ValueError(f"reward must be given, because the rule of scale {scale} asks for rewards, got none")
            found = values(search.reward, "reward").nan_to_num(nan=-torch.inf, neginf=-torch.inf, posinf=torch.inf)
            self.tree.rewards[scale] = found
            return found

        @cache
        def features() -> Tensor:
            if search.features is None:
                return states(True).unflatten(0, shape).flatten(2)
            return values(search.features, "features").flatten(2)

        return Paths(
            scale,
            self.num_scales,
            num_paths,
            search.num_kept(scale, self.num_scales),
            self.labels,
            rewards,
            tuple(self.history),
            features,
            partial(draws.selections, scale),
        )

    def of_images(self, generation: Any) -> Any:
        """A generation of all paths as one of the images that are left: of every scale, what led to the image."""
        if self.search is None:
            return generation
        ancestors, tree = self.tree.ancestors(), self.tree
        places = torch.arange(self.batch_size, device=self.device)
        rows = [places * t.shape[1] + path for t, path in zip(tree.tokens, ancestors, strict=True)]

        def led(found: list) -> list:
            return [keep_rows(entry, row) for entry, row in zip(found, rows, strict=True)]

        return generation._replace(
            tokens=led(generation.tokens),
            scores=led(generation.scores),
            choices=led(generation.choices),
            steps=led(generation.steps),
            paths=tree,
        )


def keep_rows(entry: Any, rows: Tensor) -> Any:
    """Some rows of what one scale recorded: a tensor, the steps of a search, or None."""
    if isinstance(entry, Steps):
        return Steps(*(tensor.index_select(0, rows) for tensor in entry))
    return None if entry is None else entry.index_select(0, rows)
