"""Three ways to train the demo's scorer, and the accuracy of each scorer.

They compare the pairwise with the pointwise loss (LSRS, Table 2), and training with and without the first scale
(Table 10). Each training has a quarter of the steps of ``varkern demo train``. All three use the same token maps of the
shipped VQ-VAE and VAR, the same pairs in the same order, and the same initial weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from varkern.data import TokenMaps, file_sha256
from varkern.demo.run import WEIGHTS
from varkern.demo.train import SCORER_SIZES, Recipe, write_generated_tokens, write_real_tokens
from varkern.models import load_vae
from varkern.runs import claim, find_rank, open_folder, write_json
from varkern.scorer import Scorer
from varkern.tables import markdown_table
from varkern.training import report as scores
from varkern.training.features import FeatureMaker
from varkern.training.pairs import make_pairs
from varkern.training.recipe import ScorerTraining, wins
from varkern.training.scorer import read_facts, train_scorer

RECIPE = Recipe(scorer_epochs=1.6)
PAIRS, PAIRS_SEED = 10_000, 8_000_000  # pairs for the accuracy; no training uses this seed
PAIRS_ARE = "jittered digits and generated ones of other seeds than any scorer was trained on"
BASELINE = "pairwise"
COLUMNS = {  # of the Markdown table, in the order of the paper's Table 10
    "pairwise": "pairwise, with the first scale",
    "pairwise-from-scale-1": "without the first scale",
    "pointwise": "pointwise",
    "shipped": "shipped",
}


def trainings(recipe: Recipe) -> dict[str, ScorerTraining]:
    """The settings of the three trainings, by the name of the scorer's file."""
    whole = recipe.scorer_training()
    first = replace(whole, first_scale=1)
    return {"pointwise": replace(whole, loss="pointwise"), "pairwise": whole, "pairwise-from-scale-1": first}


def run(
    out: Path, device: torch.device, weights: Path = WEIGHTS, recipe: Recipe = RECIPE, pairs: int = PAIRS
) -> dict[str, Path]:
    """Train the three scorers, and measure their accuracy and that of the shipped scorer.

    A killed run continues where it stopped.

    Args:
        out: folder for ``tokens/``, the scorers (``NAME.safetensors``, each with its CSV) and ``scorers.json``.
        device: device of the training.
        weights: folder of the VQ-VAE, the VAR and the shipped scorer.
        recipe: recipe of the token maps and of each training.
        pairs: number of pairs of a real and a generated token map for the accuracy.

    Returns:
        the files of the trained scorers by name.

    Raises:
        FileNotFoundError: if a model is missing in ``weights``.
        ValueError: if ``out`` has files made with other settings, or scorers are missing under ``torchrun``.
    """
    hashes = {name: file_sha256(weights / f"{name}.safetensors") for name in ("vae", "var", "scorer")}
    settings = {**asdict(recipe), "pairs": pairs, "pairs_seed": PAIRS_SEED, **hashes}
    open_folder(out)
    claim(out, settings)
    files = {name: out / f"{name}.safetensors" for name in trainings(recipe)}
    if all(path.exists() for path in (*files.values(), out / "scorers.json")):
        return files
    if find_rank()[1] > 1:
        raise ValueError(f"{out} has no scorers yet; one process must train them: first call this without torchrun")
    datasets = write_datasets(recipe, weights, device, out / "tokens", "")
    maker = FeatureMaker.of_quantizer(load_vae(weights / "vae.safetensors").quantize)
    for name, training in trainings(recipe).items():
        train_scorer(*datasets, maker, SCORER_SIZES, training, files[name], device=device)
    judged = replace(recipe, real_maps=pairs, generated_maps=pairs, seed=PAIRS_SEED, sampling_seed=PAIRS_SEED)
    datasets = write_datasets(judged, weights, device, out / "tokens", "judged-")
    everyone = {"shipped": weights / "scorer.safetensors", **files}
    write_json(out / "scorers.json", {"settings": settings, **judge(everyone, *datasets, maker.to(device), device)})
    return files


def write_datasets(
    recipe: Recipe, weights: Path, device: torch.device, folder: Path, prefix: str
) -> tuple[TokenMaps, TokenMaps]:
    """Write token maps of real and of generated digits to two folders whose names begin with ``prefix``."""
    real = write_real_tokens(recipe, weights, device, folder / f"{prefix}real")
    return real, write_generated_tokens(recipe, weights, device, folder / f"{prefix}generated")


def judge(
    files: dict[str, Path], real: TokenMaps, generated: TokenMaps, maker: FeatureMaker, device: torch.device
) -> dict[str, Any]:
    """Accuracy of every scorer on the same pairs, per scale from its first trained scale on, as JSON values."""
    part = make_pairs(real, generated, 0.0, 0).training
    judged, won = {}, {}
    for name, path in files.items():
        first = read_facts(path).get("settings", {}).get("first_scale", 0)
        found = scores.score_pairs(Scorer.from_pretrained(path, device=device), maker, part, first)
        rows = scores.figures(found, first)["scales"]
        judged[name] = [{key: value for key, value in row.items() if key != "histogram"} for row in rows]
        won[name] = dict(enumerate(wins(*found).double().unbind(1), first))
    changes = {name: list(changes_of(won[BASELINE], won[name])) for name in won if name != BASELINE}
    return {"pairs": len(part), "pairs_are": PAIRS_ARE, "scorers": judged, "changes": changes}


def changes_of(baseline: dict[int, Tensor], other: dict[int, Tensor]) -> Iterator[dict[str, float]]:
    """The accuracy of another scorer minus that of the baseline, at every scale that both were trained on.

    Both use the same pairs, so the standard error is computed from the differences between pairs.

    Args:
        baseline, other: per scale, the result of each pair, ``[N]`` float64: 1 if the real map has the higher score,
            1/2 for equal scores, else 0.
    """
    for scale in sorted(baseline.keys() & other.keys()):
        differences = other[scale] - baseline[scale]
        error = float(differences.std(correction=0)) / math.sqrt(len(differences))
        yield {"scale": scale, "change": float(differences.mean()), "standard_error": error}


def markdown(report: dict[str, Any]) -> str:
    """The report as a Markdown table: a row per scale, with each scorer's accuracy and its change to the baseline."""
    head, columns = ["scale"], []
    for name, title in COLUMNS.items():
        rows = report["scorers"][name]
        head.append(title)
        columns.append({r["scale"]: f"{r['accuracy']:.3f} ({r['accuracy_standard_error']:.3f})" for r in rows})
        if name != BASELINE:
            rows = report["changes"][name]
            head.append("change")
            columns.append({r["scale"]: f"{r['change']:+.3f} ({r['standard_error']:.3f})" for r in rows})
    scales = sorted(set().union(*columns))
    return markdown_table(head, ([scale, *(column.get(scale, "-") for column in columns)] for scale in scales))
