"""Measuring the demo model: sweeps of the papers' presets and of further cells."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from varkern.cli.options import load_scorers
from varkern.data import file_sha256
from varkern.demo.measuring import RealDigits, adapt_preset, extractor, fingerprint, measure_digits, to_bytes
from varkern.demo.run import WEIGHTS
from varkern.demo.train import SAMPLING
from varkern.metrics.evaluate import compare, measure
from varkern.metrics.features import Extractor
from varkern.metrics.statistics import Measured
from varkern.models import VQVAE, load_var
from varkern.runs import find_rank, write_json
from varkern.studies import report
from varkern.studies.cells import Cell, unique
from varkern.studies.models import Models
from varkern.studies.presets import PRESETS, Preset
from varkern.studies.sweep import Entry, Settings, Sweep

from . import scorers

REPORTED_SEED = 5_000_000  # settings were chosen with other seeds
BATCH_SIZE, TIMED_IMAGES = 100, 24
# 10% of all pairs of candidates are closer than this. 99% are closer than the published 1.8, which is for another
# codebook.
NEAR = 0.65


def own_presets() -> list[Preset]:
    """The presets that are in neither paper."""
    picks = ("best", "resample")
    best = [Cell(m=m, pick=pick) for pick in picks for m in (1, 2, 4, 8, 16, 32, 64, 128, 256)]
    best += [Cell(m=m, first_scale=k, pick=pick) for pick in picks for k in (0, 2) for m in (4, 16, 64)]
    hybrid = Cell(n=50, min_distance=0.0)
    losses = [Cell(m=m, pick="resample", scorer=name) for name in ("pointwise", "pairwise") for m in (4, 16, 32)]
    first = [Cell(m=m, scorer=f"pairwise{name}") for name in ("", "-from-scale-1") for m in (4, 8, 16, 32)]
    apart = [hybrid, replace(hybrid, min_distance=NEAR), replace(hybrid, threshold="paper")]
    small = [Cell(n=n, strategy="small", min_distance=0.0) for n in (20, 50, 100)]
    combined = [hybrid, replace(hybrid, m=4, first_scale=2), Cell(m=4, first_scale=2)]
    blocks = [Cell(m=m, pick="resample") for m in (16, 64, 256)]
    blocks += [Cell(m=m, proposals=p, pick="resample") for m, p in ((4, 2), (8, 8), (64, 32))]
    blocks += [Cell(m=8, proposals=8, sweeps=sweeps, pick="resample") for sweeps in (2, 3, 5)]
    blocks += [Cell(m=8, proposals=8, first_scale=0, pick="resample")]
    blocks += [Cell(m=m, proposals=p, pick="resample", temperature="fitted") for m, p in ((64, 0), (8, 8))]
    blocks += [Cell(m=64, pick="resample", temperature=t) for t in (0.8, 0.6)]
    blocks += [Cell(m=4, proposals=4)]
    blocks += [Cell(m=m, pick="resample", scorer="sum") for m in (16, 64, 256)]
    blocks += [Cell(m=m, proposals=p, pick="resample", scorer="sum") for m, p in ((8, 8), (64, 32))]
    few_first = (1, 2, 8, 64, 64)  # by the figures of single scales of bench.greedy, which has other seeds
    by_scale = [Cell(m=2), Cell(m=64), Cell(m=64, first_scale=2), Cell(m=few_first)]
    by_scale += [Cell(m=m, pick="resample") for m in (64, few_first)]
    return [
        make_preset("best-of-m", "Best of M: greedy and resampled, by M and first searched scale", best),
        make_preset("blocks", "Maps resampled block by block, and whole maps", blocks),
        make_preset("greedy-by-scale", "Greedy picks with few candidates at the scales with few tokens", by_scale),
        make_preset("densities", "Density search: least dense, min_distance, threshold as printed", [*small, *apart]),
        make_preset("combined", "Density search at scale 1 and best of 4 after it", combined),
        make_preset("without-first-scale", "Greedy picks of a scorer trained with or without the first scale", first),
        make_preset(
            "losses-resampled", "Resampled picks of scorers trained with the pointwise or pairwise loss", losses
        ),
    ]


def make_preset(name: str, title: str, cells: Sequence[Cell]) -> Preset:
    """A preset that begins with the model alone."""
    return Preset(name, title, "", tuple((cell, {}) for cell in unique([Cell(), *cells])))


def presets() -> dict[str, Preset]:
    """All presets by name. Tables 4 and 3a need several models, and Fig. 3 repeats other tables; they are left out."""
    left_out = ("lsrs-table4", "lsrs-fig3", "var-scaling-table3a")
    chosen = [*own_presets(), *(adapt_preset(preset) for preset in PRESETS.values() if preset.name not in left_out)]
    # The longest preset comes last, followed only by those that are only timed.
    chosen.sort(key=lambda preset: (preset.timing, preset.name == "lsrs-table9"))
    return {preset.name: preset for preset in chosen}


def run(
    out: Path,
    images: int,
    repeats: int,
    device: torch.device,
    weights: Path = WEIGHTS,
    command: str = "",
    names: Sequence[str] = (),
) -> list[Path]:
    """Measure and time presets, and write tables and pictures. A killed run continues where it stopped.

    Args:
        out: folder for the figures; the scorers go to ``out/scorers``.
        images: images per cell and seed.
        repeats: seeds per cell.
        device: the models' device.
        weights: folder of the four models.
        command: the command that makes these figures, for the tables.
        names: names of the presets; empty: all of them.

    Returns:
        the files written; empty under ``torchrun``, because processes that run together cannot measure times.

    Raises:
        ValueError: if an argument is wrong, or ``out`` has figures of other settings.
    """
    chosen = [preset for name, preset in presets().items() if name in names or not names]
    files = shipped_scorers(weights)
    if {cell.scorer for preset in chosen for cell in preset.cells} - files.keys():
        files |= {name: [path] for name, path in scorers.run(out / "scorers", device, weights).items()}
    models, settings = make_models(weights, files, device), make_settings(images, repeats, weights, device)
    features = extractor(weights, device)
    reference = measure_digits(features, REPORTED_SEED, images)
    timing = replace(settings, images=TIMED_IMAGES, batch_size=TIMED_IMAGES, timing=True)
    measured = [preset for preset in chosen if not preset.timing]
    found = {p.name: Sweep(out, p.cells, settings, models, features, reference).run() for p in measured}
    if find_rank()[1] > 1:
        return []
    written, times = [], f"one batch of {TIMED_IMAGES} per seed, taken apart from the rest"
    for preset in chosen:
        entries = Sweep(out / "timing", preset.cells, timing, models).run()
        if not preset.timing:
            entries = with_times(found[preset.name], entries)
        made_with = {**(timing if preset.timing else settings).as_json(), "features": features.name}
        written += report.write(report.Found(preset, entries, made_with, command, times), out)
    if names:
        return written
    kept = {
        "references.json": references(models.model("").vae_proxy[0], settings, features, reference),
        "scorers.json": json.loads((out / "scorers" / "scorers.json").read_text()),
    }
    for name, values in kept.items():
        write_json(out / name, values)
    return [*written, *(out / name for name in kept)]


def shipped_scorers(weights: Path) -> dict[str, list[Path]]:
    """The files of each scorer that cells can name: the first of ``varkern demo train``, and the sum of both."""
    first = weights / "scorer.safetensors"
    return {"": [first], "sum": [first, weights / "second.safetensors"]}


def make_models(weights: Path, files: dict[str, list[Path]], device: torch.device) -> Models:
    """The VAR of ``weights`` and the scorers in ``files``; each is loaded at its first use."""
    hashes = {name: [file_sha256(path)[:16] for path in paths] for name, paths in files.items()}
    return Models(
        {"": partial(load_var, weights / "var.safetensors", vae=weights / "vae.safetensors", device=device)},
        {name: partial(load_scorers, paths, device) for name, paths in files.items()},
        {name: found if len(found) > 1 else found[0] for name, found in hashes.items()},
    )


def make_settings(images: int, repeats: int, weights: Path, device: torch.device) -> Settings:
    facts = {"weights": fingerprint(weights), "device": device.type}
    options = {**SAMPLING, "top_k": 0}
    return Settings(images, repeats, REPORTED_SEED, BATCH_SIZE, options, None, images, facts=facts)


def with_times(entries: Sequence[Entry], times: Sequence[Entry]) -> list[Entry]:
    """``entries`` with the seconds and the memory of ``times``, a sweep of the same cells."""
    joined = []
    for entry, timed in zip(entries, times, strict=True):
        costs = [{name: repeat[name] for name in report.COSTS} for repeat in timed.repeats]
        joined.append(Entry(entry.cell, [a | b for a, b in zip(entry.repeats, costs, strict=True)]))
    return joined


def references(vae: VQVAE, settings: Settings, features: Extractor, reference: Measured) -> dict[str, Any]:
    """Figures of other real digits, and of the same digits after the VQ-VAE: no generated digits can be much better."""
    rows: dict[str, list[dict[str, Any]]] = {"real": [], "reconstructed": []}
    for repeat in range(settings.repeats):
        others = RealDigits(settings.images, settings.seed + 1000 + repeat)
        for name, images in (("real", others), ("reconstructed", Reconstructed(others, vae))):
            found = compare(measure(images, features, BATCH_SIZE, settings.images), reference, features.name).as_json()
            rows[name].append({key: value for key, value in found.items() if key in report.FIGURES})
    return rows


class Reconstructed(RealDigits):
    """Real digits after encoding and decoding by a VQ-VAE."""

    def __init__(self, digits: RealDigits, vae: VQVAE):
        self.images, self.labels, self.size = digits.images, digits.labels, digits.size
        self.name, self.vae = f"{digits.name} through the VQ-VAE", vae

    @torch.inference_mode()
    def batches(self, batch_size: int) -> Iterator[Tensor]:
        device = next(self.vae.parameters()).device
        for batch in super().batches(batch_size):
            images = batch.to(device).float() / 127.5 - 1
            yield to_bytes(self.vae.img_to_reconstructed_img(images, last_one=True)).cpu()
