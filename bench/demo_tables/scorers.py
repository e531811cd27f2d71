"""Compares ways to train the demo's scorer: ``varkern demo scorers`` writes three scorers, scorers.json and scorers.md.

The pairwise loss beside the pointwise one (LSRS, Table 2), and with the first scale trained on or not (Table 10), each
for a quarter of the steps that ``varkern demo train`` takes. All three see the same token maps, of the shipped VQ-VAE
and VAR, the same pairs in the same order, and begin with the same weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from varkern.data import TokenMaps, file_sha256
from varkern.demo import digits
from varkern.demo.run import WEIGHTS
from varkern.demo.train import SCORER_SIZES, Recipe, write_generated_tokens, write_real_tokens
from varkern.models import load_vae
from varkern.runs import claim, open_folder, write_json, write_text
from varkern.scorer import Scorer
from varkern.training import report as scores
from varkern.training.features import FeatureMaker
from varkern.training.pairs import make_pairs
from varkern.training.recipe import ScorerTraining, wins
from varkern.training.scorer import read_facts, train_scorer

BASELINE = "pairwise"
COLUMNS = {  # of the Markdown, in the order of the paper's Table 10
    "pairwise": "pairwise, with the first scale",
    "pairwise-from-scale-1": "without the first scale",
    "pointwise": "pointwise",
    "shipped": "shipped",
}
PAIRS_ARE = "jittered digits and generated ones of other seeds than any scorer was trained on"


@dataclass(frozen=True)
class Comparison:
    """What is trained, and what the scorers are judged on.

    Args:
        recipe: of the token maps and of each training.
        pairs: of a real and a generated token map, none of which any training saw, to judge on.
        pairs_seed: from which their random numbers are made.
    """

    recipe: Recipe = field(default_factory=lambda: Recipe(scorer_epochs=1.6))
    pairs: int = 10_000
    pairs_seed: int = 8_000_000

    def __post_init__(self):
        for name, count in (
            ("real_maps", self.recipe.real_maps),
            ("generated_maps", self.recipe.generated_maps),
            ("pairs", self.pairs),
        ):
            if count < digits.NUM_CLASSES:
                raise ValueError(f"{name} must be >= {digits.NUM_CLASSES}, one a class, got {count}")
        if self.pairs_seed in (self.recipe.seed, self.recipe.sampling_seed):
            raise ValueError(f"pairs_seed must not be a seed of the training's token maps, got {self.pairs_seed}")

    def trainings(self) -> dict[str, ScorerTraining]:
        """By the name of the scorer's file."""
        whole = self.recipe.scorer_training()
        return {
            "pointwise": replace(whole, loss="pointwise"),
            "pairwise": whole,
            "pairwise-from-scale-1": replace(whole, first_scale=1),
        }

    def judged(self) -> Recipe:
        """The recipe of the token maps to judge on."""
        seeds = {"seed": self.pairs_seed, "sampling_seed": self.pairs_seed}
        return replace(self.recipe, real_maps=self.pairs, generated_maps=self.pairs, **seeds)

    def settings(self, weights: Path) -> dict[str, Any]:
        """What every file depends on, JSON values by name.

        Raises:
            FileNotFoundError: if ``weights`` lacks a model.
        """
        used = ("seed", "batch_size", "scorer_epochs", "real_maps", "generated_maps", "sampling_seed")
        files = {name: file_sha256(weights / f"{name}.safetensors") for name in ("vae", "var", "scorer")}
        return {
            **{name: getattr(self.recipe, name) for name in used},
            "pairs": self.pairs,
            "pairs_seed": self.pairs_seed,
            **files,
        }


def run(
    out: Path, device: torch.device | str = "cpu", comparison: Comparison | None = None, weights: Path = WEIGHTS
) -> str:
    """Train the three scorers and judge them and the shipped one, going on where a killed run stopped.

    Args:
        out: folder for ``tokens/``, the scorers (``NAME.safetensors``, each with its CSV), ``scorers.json`` and
            ``scorers.md``.
        device: where to train.
        comparison: what to do; None: what the page of the demo shows.
        weights: folder of the VQ-VAE, the VAR and the scorer that is judged as the shipped one.

    Returns:
        the table in Markdown.

    Raises:
        FileNotFoundError: if ``weights`` lacks a model.
        ValueError: if ``out`` holds files made with other settings.
    """
    comparison, device = comparison or Comparison(), torch.device(device)
    settings = comparison.settings(weights)
    open_folder(out)
    claim(out, settings)
    datasets = write_datasets(comparison.recipe, weights, device, out / "tokens", "")
    maker = FeatureMaker.of_quantizer(load_vae(weights / "vae.safetensors").quantize)
    files = {"shipped": weights / "scorer.safetensors"}
    for name, training in comparison.trainings().items():
        files[name] = out / f"{name}.safetensors"
        train_scorer(*datasets, maker, SCORER_SIZES, training, files[name], device=device)
    judged = write_datasets(comparison.judged(), weights, device, out / "tokens", "judged-")
    report = {"settings": settings, **judge(files, *judged, maker.to(device), device)}
    text = markdown(report)
    write_json(out / "scorers.json", report)
    write_text(out / "scorers.md", text)
    return text


def write_datasets(
    recipe: Recipe, weights: Path, device: torch.device, folder: Path, prefix: str
) -> tuple[TokenMaps, TokenMaps]:
    """Token maps of real and of generated digits, in two folders whose names begin with ``prefix``."""
    return (
        write_real_tokens(recipe, weights, device, folder / f"{prefix}real"),
        write_generated_tokens(recipe, weights, device, folder / f"{prefix}generated"),
    )


def judge(
    files: dict[str, Path], real: TokenMaps, generated: TokenMaps, maker: FeatureMaker, device: torch.device
) -> dict[str, Any]:
    """Accuracy of every scorer on the same pairs, by scale from the first that it was trained on, JSON values."""
    part = make_pairs(real, generated, 0.0, 0).training
    judged, won = {}, {}
    for name, path in files.items():
        settings = read_facts(path).get("settings", {})
        first = settings.get("first_scale", 0)
        found = scores.score_pairs(Scorer.from_pretrained(path, device=device), maker, part, first)
        rows = scores.figures(found, first)["scales"]
        judged[name] = [{key: value for key, value in row.items() if key != "histogram"} for row in rows]
        won[name] = by_scale(wins(*found), first)
    changes = {name: list(changes_of(won[BASELINE], won[name])) for name in won if name != BASELINE}
    return {"pairs": len(part), "pairs_are": PAIRS_ARE, "scorers": judged, "changes": changes}


def by_scale(won: Tensor, first_scale: int) -> dict[int, Tensor]:
    """``[N, scales]`` as one ``[N]`` float64 a scale."""
    return {first_scale + column: values for column, values in enumerate(won.double().unbind(1))}


def changes_of(baseline: dict[int, Tensor], other: dict[int, Tensor]) -> Iterable[dict[str, float]]:
    """How much more often another scorer is right than the baseline, at every scale that both know.

    Both judge the same pairs, so the standard error is that of the differences pair by pair: a pair on which they
    agree says nothing about the change.
    """
    for scale in sorted(baseline.keys() & other.keys()):
        differences = other[scale] - baseline[scale]
        error = float(differences.std(correction=0)) / math.sqrt(len(differences))
        yield {"scale": scale, "change": float(differences.mean()), "standard_error": error}


def markdown(report: dict[str, Any]) -> str:
    """The report as a Markdown table: a row a scale, the change of each scorer against the baseline beside it."""
    head, columns = ["scale"], []
    for name, title in COLUMNS.items():
        rows = {row["scale"]: row for row in report["scorers"][name]}
        head.append(title)
        columns.append({k: f"{row['accuracy']:.3f} ({row['accuracy_standard_error']:.3f})" for k, row in rows.items()})
        if name != BASELINE:
            head.append("change")
            columns.append(
                {row["scale"]: f"{row['change']:+.3f} ({row['standard_error']:.3f})" for row in report["changes"][name]}
            )
    lines = [head, ["---"] * len(head)]
    for scale in sorted(set().union(*columns)):
        lines.append([str(scale), *(column.get(scale, "-") for column in columns)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
