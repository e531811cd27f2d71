"""Boosting against averaging on the demo model: is a second scorer better trained on top of the first, or by itself?

    python -m bench.boosting --out DIR

For each training seed this trains three scorers with the same number of steps: the first; another one like it, on other
samples of the model; and a second one on samples of a search with the first, from the same seeds, real maps, initial
weights and order of pairs as the other. Then it measures images of the first alone, of the mean of the first and the
other, and of the sum of the first and the second. Each seed has token maps of its own, so the spread over seeds is that
of repeating everything.

It can be killed at any time and continues where it stopped. ``--only N`` makes one training seed, so that several
processes can share the seeds. Every call writes ``boosting.json`` and ``boosting.md`` of the seeds that are finished.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor

from bench.commands import command, describe_command
from varkern import Scorer, SumOfScorers, load_vae, load_var
from varkern.cli.options import pick_local_device, require
from varkern.data import file_sha256
from varkern.demo.measuring import extractor, fingerprint, measure_digits
from varkern.demo.run import WEIGHTS
from varkern.demo.train import (
    RESAMPLED_M,
    SAMPLING,
    SCORER_SIZES,
    Recipe,
    resample_with,
    write_generated_tokens,
    write_real_tokens,
)
from varkern.runs import claim, open_folder, write_json, write_text
from varkern.studies.cells import Cell
from varkern.studies.models import Models
from varkern.studies.sweep import Entry, Settings, Sweep
from varkern.tables import markdown_table
from varkern.training.features import FeatureMaker
from varkern.training.scorer import train_scorer

EVALUATED_SEED = 6_000_000  # no training and no other table uses these seeds
LEAST_IMAGES = 100  # the distance of 64 features needs more images than features
SEARCHES = {
    "resample, M=16": Cell(m=16, pick="resample"),
    "resample, M=64": Cell(m=64, pick="resample"),
    "blocks, m=8, 8 proposals": Cell(m=8, proposals=8, pick="resample"),
}
SCORERS = {
    "first": "the first alone",
    "mean": "mean of the first and another",
    "boosted": "sum of the first and one on top",
}
FIGURES = {"fid": ("Fréchet distance", 2), "precision": ("precision", 3), "recall": ("recall", 3)}


class Mean(SumOfScorers):
    """The mean of the scores of several scorers, for scorers that were each trained without the others."""

    def forward(self, labels: Tensor, features: Tensor, scale: int) -> Tensor:
        return super().forward(labels, features, scale) / len(self.scorers)


def train(folder: Path, number: int, recipe: Recipe, m: int, device: torch.device) -> dict[str, Path]:
    """Train the three scorers of training seed ``number``; returns their files by name.

    Args:
        folder: folder for token maps and scorers.
        number: the training seed.
        recipe: sizes of the datasets and length of each training.
        m: number of candidates of the search that draws the second scorer's maps.
        device: device of everything.
    """
    first = replace(recipe, seed=recipe.seed + 100 * number, sampling_seed=recipe.sampling_seed + 10 * number)
    again = replace(first, seed=first.seed + 50, sampling_seed=first.sampling_seed + 5)
    files = {name: folder / f"{name}.safetensors" for name in ("first", "other", "second")}
    if all(path.exists() for path in files.values()):
        return files
    maker = FeatureMaker.of_quantizer(load_vae(WEIGHTS / "vae.safetensors").quantize)
    real = write_real_tokens(first, WEIGHTS, device, folder / "tokens" / "real")
    for name, path in files.items():
        how = first if name == "first" else again
        search = resample_with(files["first"], device, m) if name == "second" else ()
        generated = write_generated_tokens(how, WEIGHTS, device, folder / "tokens" / name, *search)
        train_scorer(real, generated, maker, SCORER_SIZES, how.scorer_training(), path, device=device)
    return files


def measure(folder: Path, number: int, files: dict[str, Path], images: int, device: torch.device) -> list[Entry]:
    """Generate and measure the images of every search with every scorer, and of the model alone."""
    pairs = {"first": ("first",), "mean": ("first", "other"), "boosted": ("first", "second")}
    joined = {"first": Mean, "mean": Mean, "boosted": SumOfScorers}

    def load(name: str) -> Any:
        return joined[name](*(Scorer.from_pretrained(files[part], device=device) for part in pairs[name]))

    models = Models(
        {"": partial(load_var, "demo", device=device)},
        {name: partial(load, name) for name in pairs},
        {name: [file_sha256(files[part])[:16] for part in parts] for name, parts in pairs.items()},
    )
    features, seed = extractor(WEIGHTS, device), EVALUATED_SEED + number
    facts = {"weights": fingerprint(WEIGHTS), "device": device.type}
    settings = Settings(images, 1, seed, 100, {**SAMPLING, "top_k": 0}, None, images, facts=facts)
    cells = [Cell(), *(replace(cell, scorer=name) for name in SCORERS for cell in SEARCHES.values())]
    reference = measure_digits(features, seed, images)
    entries = Sweep(folder / "figures", cells, settings, models, features, reference, (0, 1)).run()
    assert entries is not None, "this process makes all cells"
    return entries


def run(out: Path, number: int, recipe: Recipe, images: int, m: int, device: torch.device) -> None:
    """Train and measure one training seed, and write its figures.

    Raises:
        ValueError: if ``out`` has figures of other settings.
    """
    folder = out / f"seed-{number}"
    open_folder(folder)
    hashes = {name: file_sha256(WEIGHTS / f"{name}.safetensors") for name in ("vae", "var")}
    claim(folder, {**asdict(recipe), "images": images, "m": m, "device": device.type, **hashes})
    entries = measure(folder, number, train(folder, number, recipe, m, device), images, device)
    rows = [
        {"scorer": e.cell.scorer, "cell": replace(e.cell, scorer="").name, **{n: e.repeats[0][n] for n in FIGURES}}
        for e in entries
    ]
    write_json(folder / "figures.json", {"seed": number, "rows": rows})


def compare(seeds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Figures of all finished seeds: by search and scorer, and boosted minus mean and either minus first, in pairs."""
    found = [{(row["cell"], row["scorer"]): row for row in seed["rows"]} for seed in seeds]
    figures = [
        {"search": title, "scorer": name, **{n: summarize(rows[cell.name, name][n] for rows in found) for n in FIGURES}}
        for title, cell in SEARCHES.items()
        for name in SCORERS
    ]
    alone = {n: summarize(rows[Cell().name, ""][n] for rows in found) for n in FIGURES}
    differences = [
        {
            "search": title,
            "of": [first, second],
            **{n: summarize(rows[cell.name, first][n] - rows[cell.name, second][n] for rows in found) for n in FIGURES},
        }
        for title, cell in SEARCHES.items()
        for first, second in (("boosted", "mean"), ("boosted", "first"), ("mean", "first"))
    ]
    numbers = [seed["seed"] for seed in seeds]
    return {"training_seeds": numbers, "alone": alone, "figures": figures, "differences": differences}


def summarize(values: Iterable[float]) -> dict[str, Any]:
    """Mean and standard error of the mean over training seeds; no error for a single one."""
    values = list(values)
    error = stdev(values) / sqrt(len(values)) if len(values) > 1 else None
    return {"mean": fmean(values), "standard_error": error, "values": values}


def markdown(report: dict[str, Any]) -> str:
    """The report as two tables: figures, and differences within a training seed."""
    titles = [title for title, _ in FIGURES.values()]
    rows = [["the model alone", "", *show(report["alone"])]]
    rows += [[row["search"], SCORERS[row["scorer"]], *show(row)] for row in report["figures"]]
    seeds = f"mean ± standard error over {len(report['training_seeds'])} training seeds"
    parts = [f"`{report['command']}`: {seeds} of {report['images']:,} images each."]
    parts.append(markdown_table(["search", "scorer", *titles], rows))
    rows = [[row["search"], " − ".join(row["of"]), *show(row, "+")] for row in report["differences"]]
    parts += ["Differences within a training seed:", markdown_table(["search", "difference", *titles], rows)]
    return "\n".join(part if part.endswith("\n") else part + "\n" for part in parts)


def show(row: dict[str, Any], sign: str = "") -> list[str]:
    """The cells of one row: mean ± standard error."""
    cells = []
    for name, (_, digits) in FIGURES.items():
        mean, error = row[name]["mean"], row[name]["standard_error"]
        cells.append(f"{mean:{sign}.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}"))
    return cells


@command("boosting")
def main(arguments: list[str] | None = None) -> str:
    usual = Recipe()
    parser = argparse.ArgumentParser("bench.boosting", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for scorers, figures and tables")
    parser.add_argument("--seeds", type=int, default=5, help="number of training seeds (default: %(default)s)")
    parser.add_argument("--only", type=int, help="number of the only training seed to make; default: all of them")
    parser.add_argument("--images", type=int, default=2000, help="images per cell and seed (default: %(default)s)")
    parser.add_argument("--maps", type=int, default=usual.generated_maps, help="generated maps of each training")
    parser.add_argument("--epochs", type=float, default=usual.scorer_epochs, help="epochs of each training")
    parser.add_argument(
        "--m", type=int, default=RESAMPLED_M, help="candidates of the search that draws the second's maps"
    )
    parser.add_argument("--device", default="cpu", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    options = parser.parse_args(arguments)
    words = describe_command(parser, options, ("seeds", "images", "maps", "epochs", "m", "device"))
    recipe = replace(usual, scorer_epochs=options.epochs, generated_maps=options.maps, real_maps=2 * options.maps)
    for name, least in (("seeds", 1), ("images", LEAST_IMAGES), ("maps", 100), ("m", 2)):
        require(name, getattr(options, name), least)
    if options.only is not None and not 0 <= options.only < options.seeds:
        raise ValueError(f"only must be in 0..{options.seeds - 1}, the training seeds, got {options.only}")
    device = pick_local_device(options.device)
    for number in range(options.seeds) if options.only is None else [options.only]:
        run(options.out, number, recipe, options.images, options.m, device)
        paths = [options.out / f"seed-{seed}" / "figures.json" for seed in range(options.seeds)]
        seeds = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]
        report = {"command": words, "images": options.images, **compare(seeds)}
        write_json(options.out / "boosting.json", report)
        write_text(options.out / "boosting.md", markdown(report))
    return markdown(report)


if __name__ == "__main__":
    sys.exit(main())
