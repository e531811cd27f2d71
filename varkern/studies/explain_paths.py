"""What a search over paths did in one generation: the image of every path at every scale, and who goes on from whom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from varkern.families import recognise
from varkern.generation import generate
from varkern.search import PathSearch

from .explain import decoder, partial_images
from .pictures import Link, Row, Tile, draw_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class ExplainedPaths:
    """The paths of one scale of an explained generation.

    Args:
        scale: k, counted from 0.
        side: side of its token map.
        images: the decoded image of each path, ``[n, 3, H, W]`` in [0, 1].
        rewards: rewards of the paths, ``[n]``; None if no rule asked for them.
        parents: the path of the scale before that each path goes on from; None at the first scale.
        kept: the path that leads to the image.
    """

    scale: int
    side: int
    images: Tensor
    rewards: Tensor | None
    parents: list[int] | None
    kept: int


@torch.no_grad()
def explain_paths(
    model: Any, search: PathSearch, label: int, seed: Tensor, options: Mapping[str, Any] | None = None
) -> list[ExplainedPaths]:
    """Generate one image with a search over paths; return the paths of every scale.

    Args:
        model: a VAR model.
        search: the search to explain.
        label: the image's class.
        seed: the image's seed, ``[1]`` int64.
        options: further arguments of :func:`varkern.generate`.

    Raises:
        ValueError, TypeError: if an argument is wrong, before any work.
    """
    decoder(model)  # refuses a model of another family
    sides: Any = recognise(model).spec(model).sides
    tree = generate(model, torch.tensor([label]), search=search, seeds=seed, decode=False, **dict(options or {})).paths
    found, begun, parents = [], [], None  # begun: the maps of each path up to this scale, [n, l] each
    for scale, (tokens, survivors, kept) in enumerate(zip(tree.tokens, tree.survivors, tree.ancestors(), strict=True)):
        begun.append(tokens[0])
        # Maps of later scales do not change the image so far.
        later = [tokens.new_zeros(tokens.shape[1], side**2) for side in sides[scale + 1 :]]
        images, rewards = partial_images(model, [*begun, *later])[scale], tree.rewards[scale]
        rewards = None if rewards is None else rewards[0].cpu()
        found.append(ExplainedPaths(scale, sides[scale], images, rewards, parents, int(kept[0])))
        begun, parents = [maps[survivors[0]] for maps in begun], survivors[0].tolist()
    return found


def draw_paths(scales: Sequence[ExplainedPaths], title: str) -> Figure:
    """A row per scale and a column per path; lines lead from each path to those that go on from it.

    The paths that lead to the image are framed. A caption is the reward of a path.
    """
    most = max(len(scale.images) for scale in scales)
    rows, links = [], []
    for number, scale in enumerate(scales):
        count = len(scale.images)
        label = f"scale {scale.scale}\n{scale.side}x{scale.side}\n{count} path{'' if count == 1 else 's'}"
        captions = [""] * count if scale.rewards is None else [f"{reward:+.2f}" for reward in scale.rewards]
        tiles = [Tile(scale.images[path], captions[path], path == scale.kept) for path in range(count)]
        rows.append(Row(label, [*tiles, *[None] * (most - count)]))
        for path, parent in enumerate(scale.parents or ()):
            leads = path == scale.kept and parent == scales[number - 1].kept
            links.append(Link(number - 1, parent, path, leads))
    return draw_rows(rows, [f"path {path}" for path in range(most)], title=title, links=links)


def paths_as_json(scales: Sequence[ExplainedPaths], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Per scale, the rewards and the parents of the paths in their order, as JSON values."""
    return {
        "settings": dict(settings),
        "scales": [
            {
                "scale": scale.scale,
                "side": scale.side,
                "paths": len(scale.images),
                "parents": scale.parents,
                "kept": scale.kept,
                "rewards": None if scale.rewards is None else scale.rewards.tolist(),
            }
            for scale in scales
        ],
    }
