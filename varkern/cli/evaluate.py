"""``varkern evaluate``: the quality of a set of generated images, compared with a reference."""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from varkern.demo import run as demo_run
from varkern.metrics import evaluate as evaluation
from varkern.metrics import features as extractors
from varkern.metrics.images import ImageSet, open_images
from varkern.metrics.statistics import Measured, load_statistics, save_statistics
from varkern.runs import check_file, write_json

from .options import Device, pick_device, require

TITLES = {
    "fid": "FID",
    "sfid": "sFID",
    "inception_score": "Inception score",
    "precision": "precision",
    "recall": "recall",
}
PARTS = {
    "mean_difference": "from the means: |mean_r - mean_g|²",
    "trace_term": "from the covariances",
    "trace_reference": "  Tr Σ_r",
    "trace_generated": "  Tr Σ_g",
    "cross_term": "  2 Tr (Σ_r Σ_g)^½",
}


def evaluate(
    generated: Annotated[Path, typer.Option(help="Generated images: a folder, or an .npz file with arr_0")],
    reference: Annotated[
        Path, typer.Option(help="Real images: a folder, or an .npz file with arr_0 or with statistics (mu, sigma)")
    ],
    features: Annotated[
        str, typer.Option(help="Feature extractor: inception, demo (the digits' classifier) or module:function")
    ] = "inception",
    inception_weights: Annotated[
        Path | None, typer.Option(help="File of torch-fidelity's Inception weights; default: downloaded")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File for the figures as JSON")] = None,
    save_reference: Annotated[
        Path | None,
        typer.Option(help="File for the statistics of the reference (.npz), for use as --reference"),
    ] = None,
    neighbors: Annotated[
        int, typer.Option(help="Number of images of each set for precision and recall; 0: none of both")
    ] = evaluation.PUBLISHED_IMAGES,
    batch_size: Annotated[int, typer.Option(help="Number of images per batch")] = 64,
    device: Device = "auto",
) -> None:
    """Compute FID and its parts, sFID, Inception score, precision and recall of images against a reference."""
    require("batch_size", batch_size, 1)
    require("neighbors", neighbors, 0)
    for name, path, suffix in (("out", out, ".json"), ("save_reference", save_reference, ".npz")):
        check_file(name, path, suffix)
    if save_reference is not None and save_reference.resolve() == reference.resolve():
        raise ValueError(f"save_reference must be another file than reference, got {save_reference}")
    where = pick_device(device)
    images = open_images(generated)
    real, stored = open_reference(reference)
    extractor = find_extractor(features, where, inception_weights)
    keep = None if save_reference is None else partial(save_statistics, save_reference)
    report = evaluation.evaluate(images, real, stored, extractor, batch_size, neighbors, keep)
    if out is not None:
        settings = {"generated": str(generated), "reference": str(reference)}
        write_json(out, {"settings": settings, **report.as_json()})
    against = "stored statistics" if report.reference is None else f"{report.reference:,} reference images"
    print(f"{report.generated:,} generated images against {against}, features {report.features}")
    Console().print(as_table(report))
    for reason in dict.fromkeys(report.missing.values()):
        names = [TITLES[name] for name, why in report.missing.items() if why == reason]
        print(f"left out: {' and '.join(names)}: {reason}")
    warn(report.warnings)


def open_reference(path: Path) -> tuple[ImageSet | None, Measured | None]:
    """Open the images and the statistics of a reference, which may have either or both.

    Raises:
        ValueError: if it has neither.
    """
    names: set[str] = set()
    if path.is_file() and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = {name.removesuffix(".npy") for name in archive.namelist()}
    stored = load_statistics(path) if names & {"mu", "sigma"} else None
    images = open_images(path) if stored is None or "arr_0" in names else None
    return images, stored


def find_extractor(name: str, device: torch.device, inception_weights: Path | None) -> extractors.Extractor:
    """Load the feature extractor of ``--features``.

    Raises:
        ValueError: if ``name`` or ``inception_weights`` is wrong.
        ImportError, OSError: if it cannot be loaded.
    """
    if name == "inception":
        return extractors.inception(device, inception_weights)
    if inception_weights is not None:
        raise ValueError(f"inception_weights need features inception, got {name}")
    if name == "demo":
        from varkern.demo.measuring import extractor

        return extractor(demo_run.WEIGHTS, device)
    return extractors.from_name(name, device)


def as_table(report: evaluation.Report) -> Table:
    """Make a table of the figures."""
    table = Table(show_header=False)
    table.add_column("")
    table.add_column("", justify="right")

    def add(name: str, value: float | None) -> None:
        table.add_row(name, "-" if value is None else f"{value:.4f}")

    add(TITLES["fid"], report.fid)
    if report.fid_parts is not None:
        for name, title in PARTS.items():
            add(f"  {title}", getattr(report.fid_parts, name))
    for name in ("sfid", "inception_score", "precision", "recall"):
        add(TITLES[name], getattr(report, name))
    return table


def warn(messages: Iterable[str]) -> None:
    """Print each message on stderr, as one line."""
    for message in messages:
        print(f"varkern: warning: {' '.join(message.split())}", file=sys.stderr)
