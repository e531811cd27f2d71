"""What a search did in one generation: every scale's candidates as the images they lead to."""

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

MOST_SHOWN = 8  # candidates a row; more would be no use to the eye
DECODED_AT_ONCE = 16


class RecordingSearch:
    """A search that keeps what another one does, and decodes what it saw; the other one decides as ever.

    Args:
        search: the one that is watched.
        decode: fused features ``[N, C, H, W]`` to images ``[N, 3, H', W']`` in [0, 1].
    """

    def __init__(self, search: Search, decode: Any):
        self.search, self.decode = search, decode
        self.images: dict[int, Tensor] = {}  # scale: [M, 3, H, W], of the first image of the batch

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
        return self.search.choose(candidates)


@dataclass(frozen=True)
class Explained:
    """One scale of an explained generation.

    Args:
        scale: k, from 0.
        side: of its token map.
        images: what decoding gives with each candidate fused in, ``[M, 3, H, W]`` in [0, 1]; of a scale that was not
            searched the one map that was drawn.
        scores: ``[M]``; None where there was no choice.
        kept: the place of the candidate that was kept.
        alone: the same of the model without a search, from the same seed, ``[3, H, W]``.
    """

    scale: int
    side: int
    images: Tensor
    scores: Tensor | None
    kept: int
    alone: Tensor


def decoder(model: Any):
    """``decode(f_hat [N, C, H, W]) -> images [N, 3, H', W'] in [0, 1]`` of a model whose scales add up.

    Raises:
        ValueError: if the model is of a family without such a sum.
    """
    if recognise(model).name != "VAR":
        raise ValueError(f"explaining needs a VAR model, whose scales add up to the image, got {type(model).__name__}")
    vae = model.vae_proxy[0]

    def decode(f_hat: Tensor) -> Tensor:
        return vae.fhat_to_img(f_hat).float().add(1).mul(0.5)

    return decode


def partial_images(model: Any, tokens: Sequence[Tensor]) -> Tensor:
    """The images after every scale, ``[K, B, 3, H, W]`` in [0, 1], of token maps ``[B, l]`` of all scales."""
    images = model.vae_proxy[0].idxBl_to_img(list(tokens), same_shape=True, last_one=False)
    return torch.stack([image.float().add(1).mul(0.5).cpu() for image in images])


@torch.no_grad()
def explain(
    model: Any, search: Search, label: int, seed: Tensor, options: Mapping[str, Any] | None = None
) -> list[Explained]:
    """Generate one image with a search and the same without, and tell what every scale had to choose from.

    Args:
        model: a VAR model.
        search: which candidate is kept.
        label: the image's class.
        seed: the image's own seed, ``[1]`` int64.
        options: further arguments of :func:`varkern.generate`.

    Raises:
        ValueError, TypeError: if an argument is wrong, before any work.
    """
    recording = RecordingSearch(search, decoder(model))
    labels, options = torch.tensor([label]), dict(options or {})
    found = generate(model, labels, search=recording, seeds=seed, **options)
    alone = partial_images(model, generate(model, labels, seeds=seed, **options).tokens)[:, 0]
    kept = partial_images(model, found.tokens)[:, 0]
    return [
        _explained(scale, side, found, recording.images.get(scale), kept[scale], alone[scale])
        for scale, side in enumerate(recognise(model).spec(model).sides)
    ]


def _explained(
    scale: int, side: int, found: Generation, images: Tensor | None, kept: Tensor, alone: Tensor
) -> Explained:
    if images is None:
        return Explained(scale, side, kept.unsqueeze(0), None, 0, alone)
    return Explained(scale, side, images, found.scores[scale][0].cpu(), int(found.choices[scale][0]), alone)


def shown_ranks(count: int, kept: int, most: int = MOST_SHOWN) -> list[int]:
    """Which ranks of ``count`` candidates are drawn: all, or the first, the last, some between, and the kept one."""
    if count <= most:
        return list(range(count))
    ranks = {round(step * (count - 1) / (most - 1)) for step in range(most)}
    if kept not in ranks:
        nearest = min(ranks - {0, count - 1}, key=lambda rank: abs(rank - kept))
        ranks = ranks - {nearest} | {kept}
    return sorted(ranks)


def draw(scales: Sequence[Explained], title: str) -> Figure:
    """A row per scale: its candidates from the best score down, the kept one framed, the model alone at the right."""
    most = max(min(len(scale.images), MOST_SHOWN) for scale in scales)
    rows = []
    for scale in scales:
        label = f"scale {scale.scale}\n{scale.side}x{scale.side}"
        if scale.scores is None:
            tiles = [Tile(scale.images[0], "not searched")]
        else:
            # A stable order, so that of equal scores the earlier candidate stands first.
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
    """The scores behind the picture, by scale, in the order in which candidates were drawn."""
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
