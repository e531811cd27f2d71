"""What a search did in one generation: the candidates of every scale, shown as images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from varkern.families import recognise
from varkern.generation import Generation, generate
from varkern.search import Candidates, Choice, Search
from varkern.search.base import check_highest_label, check_model
from varkern.spec import ModelSpec

from .pictures import Row, Tile, draw_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_SHOWN = 8  # candidates per row; with more, the images would be too small to compare
DECODED_AT_ONCE = 16


class RecordingSearch:
    """A search that chooses as another search does, and stores the decoded candidates of every scale.

    Args:
        search: the search that chooses.
        decode: a function of fused features ``[N, C, H, W]`` that returns images ``[N, 3, H', W']`` in [0, 1].
    """

    def __init__(self, search: Search, decode: Any):
        self.search, self.decode = search, decode
        self.images: dict[int, Tensor] = {}  # by scale: [M, 3, H, W], the candidates of the first image of the batch

    def check(self, spec: ModelSpec) -> None:
        check_model(self.search, spec)

    def check_labels(self, highest: int, spec: ModelSpec) -> None:
        check_highest_label(self.search, highest, spec)

    def num_candidates(self, scale: int, num_scales: int) -> int:
        return self.search.num_candidates(scale, num_scales)

    def choose(self, candidates: Candidates) -> Choice:
        count, parts = candidates.tokens.shape[1], []
        for start in range(0, count, DECODED_AT_ONCE):
            features = candidates.fuse(start, min(start + DECODED_AT_ONCE, count))
            parts.append(self.decode(features[0].contiguous()).cpu())
        self.images[candidates.scale] = torch.cat(parts)
        choice = self.search.choose(candidates)
        if choice.tokens is not None:
            raise ValueError(
                f"search must keep one of the candidates to be explained, got {self.search!r}, which composes maps"
            )
        return choice


@dataclass(frozen=True)
class Explained:
    """One scale of an explained generation.

    Args:
        scale: k, counted from 0.
        side: side of its token map.
        images: the decoded image for each candidate, ``[M, 3, H, W]`` in [0, 1]. M is 1 if the scale is not searched.
        scores: scores of the candidates, ``[M]``; None if the scale is not searched.
        kept: index of the candidate that was kept.
        alone: the image of the model without a search, from the same seed, ``[3, H, W]`` in [0, 1].
    """

    scale: int
    side: int
    images: Tensor
    scores: Tensor | None
    kept: int
    alone: Tensor


def decoder(model: Any):
    """A function ``decode(f_hat [N, C, H, W]) -> images [N, 3, H', W'] in [0, 1]`` for a VAR model.

    Raises:
        ValueError: if the model is of another family.
    """
    if recognise(model).name != "VAR":
        raise ValueError(f"explaining needs a VAR model, whose scales add up to the image, got {type(model).__name__}")
    vae = model.vae_proxy[0]

    def decode(f_hat: Tensor) -> Tensor:
        return vae.fhat_to_img(f_hat).float().add(1).mul(0.5)

    return decode


def partial_images(model: Any, tokens: Sequence[Tensor]) -> Tensor:
    """The images after every scale, ``[K, B, 3, H, W]`` in [0, 1]; ``tokens``: per scale, a token map ``[B, l]``."""
    images = model.vae_proxy[0].idxBl_to_img(list(tokens), same_shape=True, last_one=False)
    return torch.stack([image.float().add(1).mul(0.5).cpu() for image in images])


@torch.no_grad()
def explain(
    model: Any, search: Search, label: int, seed: Tensor, options: Mapping[str, Any] | None = None
) -> list[Explained]:
    """Generate one image with a search and one without it from the same seed; return the candidates of every scale.

    Args:
        model: a VAR model.
        search: the search to explain.
        label: the image's class.
        seed: the image's seed, ``[1]`` int64.
        options: further arguments of :func:`varkern.generate`.

    Raises:
        ValueError, TypeError: if an argument is wrong, before any work; also for a search that composes maps of
            several candidates, such as :class:`varkern.BlockResample`, at its first scale.
    """
    recording = RecordingSearch(search, decoder(model))
    labels, options = torch.tensor([label]), dict(options or {})
    found = generate(model, labels, search=recording, seeds=seed, **options)
    alone = partial_images(model, generate(model, labels, seeds=seed, **options).tokens)[:, 0]
    kept = partial_images(model, found.tokens)[:, 0]
    return [
        _explain_scale(scale, side, found, recording.images.get(scale), kept[scale], alone[scale])
        for scale, side in enumerate(recognise(model).spec(model).sides)
    ]


def _explain_scale(
    scale: int, side: int, found: Generation, images: Tensor | None, kept: Tensor, alone: Tensor
) -> Explained:
    if images is None:
        return Explained(scale, side, kept.unsqueeze(0), None, 0, alone)
    return Explained(scale, side, images, found.scores[scale][0].cpu(), int(found.choices[scale][0]), alone)


def shown_ranks(count: int, kept: int, most: int = MOST_SHOWN) -> list[int]:
    """The ranks to draw, at most ``most`` of ``count``: always the first, the last and the kept one."""
    if count <= most:
        return list(range(count))
    ranks = {round(step * (count - 1) / (most - 1)) for step in range(most)}
    if kept not in ranks:
        nearest = min(ranks - {0, count - 1}, key=lambda rank: abs(rank - kept))
        ranks = ranks - {nearest} | {kept}
    return sorted(ranks)


def draw(scales: Sequence[Explained], title: str) -> Figure:
    """A row per scale: candidates from the highest score down, the kept one framed; at the right the model alone."""
    most = max(min(len(scale.images), MOST_SHOWN) for scale in scales)
    rows = []
    for scale in scales:
        label = f"scale {scale.scale}\n{scale.side}x{scale.side}"
        if scale.scores is None:
            tiles = [Tile(scale.images[0], "not searched")]
        else:
            # A stable sort: among equal scores, the earlier candidate comes first.
            order = scale.scores.argsort(descending=True, stable=True).tolist()
            ranks = shown_ranks(len(order), order.index(scale.kept))
            if len(ranks) < len(order):
                label += f"\n{len(ranks)} of {len(order)}"
            tiles = [
                Tile(
                    scale.images[order[rank]],
                    f"{f'#{rank + 1}: ' if len(ranks) < len(order) else ''}{scale.scores[order[rank]]:+.2f}",
                    order[rank] == scale.kept,
                )
                for rank in ranks
            ]
        rows.append(Row(label, [*tiles, *[None] * (most - len(tiles)), Tile(scale.alone)]))
    headings = ["best score", *[""] * (most - 1)] if most > 1 else [""]
    if most > 1 and all(scale.scores is None or len(scale.scores) >= most for scale in scales):
        headings[most - 1] = "worst"
    return draw_rows(rows, [*headings, "M=1, same seed"], title=title, rules=1)


def as_json(scales: Sequence[Explained], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Per scale, the scores of the candidates in the order in which they were sampled, as JSON values."""
    return {
        "settings": dict(settings),
        "scales": [
            {
                "scale": scale.scale,
                "side": scale.side,
                "kept": scale.kept,
                "scores": None if scale.scores is None else scale.scores.tolist(),
            }
            for scale in scales
        ],
    }
