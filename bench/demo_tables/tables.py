"""The papers' tables on the demo model: ``varkern demo table`` makes all figures of README.md beside this file."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from varkern.data import file_sha256
from varkern.demo import measuring
from varkern.demo.measuring import adapted, fingerprint, measure_digits
from varkern.demo.run import WEIGHTS
from varkern.demo.train import SAMPLING
from varkern.metrics.evaluate import compare, measure
from varkern.metrics.features import Extractor
from varkern.metrics.gathering import Measured
from varkern.models import VQVAE, load_var
from varkern.runs import PROGRESS, BeingWrittenError, check_settings, find_rank, locked, write_json
from varkern.scorer import Scorer
from varkern.studies import report as sweep_report
from varkern.studies.cells import Cell, unique
from varkern.studies.models import Models
from varkern.studies.presets import PRESETS, Preset
from varkern.studies.sweep import Entry, Settings, Sweep

from . import scorers

CPU = torch.device("cpu")
REPORTED_SEED = 5_000_000  # settings were chosen on other seeds than those reported
BATCH_SIZE, TIMED_IMAGES = 100, 24
# One pair of candidates in ten is nearer; nearly all (99%) are nearer than the published 1.8, of another codebook.
NEAR = 0.65


def own_presets() -> list[Preset]:
    """What is measured here and in neither paper."""
    best = [Cell(m=m, pick=pick) for pick in ("best", "resample") for m in (1, 2, 4, 8, 16, 32, 64, 128, 256)]
    later = [Cell(m=m, first_scale=k, pick=pick) for pick in ("best", "resample") for k in (0, 2) for m in (4, 16, 64)]
    hybrid = Cell(n=50, min_distance=0.0)
    losses = [Cell(m=m, pick="resample", scorer=name) for name in ("pointwise", "pairwise") for m in (4, 16, 32)]
    first = [Cell(m=m, scorer=f"pairwise{name}") for name in ("", "-from-scale-1") for m in (4, 8, 16, 32)]
    apart = [hybrid, replace(hybrid, min_distance=NEAR), replace(hybrid, threshold="paper")]
    small = [Cell(n=n, strategy="small", min_distance=0.0) for n in (20, 50, 100)]
    combined = [replace(hybrid, m=4, first_scale=2), Cell(m=4, first_scale=2)]
    return [
        own("best-of-m", "Best of M: greedy and resampled, by M and first searched scale", best + later),
        own("densities", "Density search: least dense, kept apart, threshold as printed", [Cell(), *small, *apart]),
        own("combined", "Density search at scale 1, best of 4 after it", [Cell(), hybrid, *combined]),
        own("without-first-scale", "Greedy, by a scorer trained with the first scale or without", [Cell(), *first]),
        own("losses-resampled", "Resampled, by scorers trained by either loss", [Cell(), *losses]),
    ]


def own(name: str, title: str, cells: Sequence[Cell]) -> Preset:
    return Preset(name, title, "", tuple((cell, {}) for cell in unique(cells)))


def presets() -> dict[str, Preset]:
    """All that is measured, by name. Tables 4 and 3a are of models of other depths, Fig. 3 joins two others."""
    left_out = ("lsrs-table4", "lsrs-fig3", "var-scaling-table3a")
    chosen = [adapted(preset) for preset in PRESETS.values() if preset.name not in left_out]
    # The longest last, and at the very end what is only timed.
    chosen.sort(key=lambda preset: (preset.timing, preset.name == "lsrs-table9"))
    return {preset.name: preset for preset in (*chosen[:-2], *own_presets(), *chosen[-2:])}


def load_models(out: Path, weights: Path, device: torch.device) -> Models:
    """The digits model, the shipped scorer and those that ``varkern demo scorers`` trains, in ``out/scorers``.

    Scorers that are not there yet, or not judged yet, are trained and judged first.

    Raises:
        ValueError: if those that are there were trained on other weights, or have to be trained under ``torchrun``.
    """
    folder, comparison = out / "scorers", scorers.Comparison()
    trained = {name: folder / f"{name}.safetensors" for name in comparison.trainings()}
    judged = folder / "scorers.json"
    if not all(path.exists() for path in (*trained.values(), judged)):
        if find_rank()[1] > 1:
            raise ValueError(f"{folder} lacks scorers, which one process trains: varkern demo scorers --out {folder}")
        scorers.run(folder, device, weights=weights)
    made_with, wanted = json.loads(judged.read_text())["settings"], comparison.settings(weights)
    check_settings(folder, {name: made_with.get(name) for name in wanted}, wanted)
    files = {"": weights / "scorer.safetensors", **trained}
    return Models(
        {"": partial(load_var, weights / "var.safetensors", vae=weights / "vae.safetensors", device=device)},
        {name: partial(Scorer.from_pretrained, path, device=device) for name, path in files.items()},
        {name: file_sha256(path)[:16] for name, path in files.items()},
    )


@dataclass(frozen=True)
class Demo:
    """The demo's sweeps.

    Args:
        out: folder for the figures; ``out/scorers`` is that of ``varkern demo scorers``.
        images: generated a cell and seed.
        repeats: seeds a cell.
        device: where to generate.
        weights: folder of the four models.
        seed: the first seed.
    """

    out: Path
    images: int = 2000
    repeats: int = 3
    device: torch.device = CPU
    weights: Path = WEIGHTS
    seed: int = REPORTED_SEED

    def settings(self, **changed: Any) -> Settings:
        facts = {"weights": fingerprint(self.weights), "device": self.device.type}
        options = {**SAMPLING, "top_k": 0}
        whole = Settings(self.images, self.repeats, self.seed, BATCH_SIZE, options, None, self.images, facts=facts)
        return replace(whole, **changed)

    def run(self) -> list[Path] | None:
        """Measure and time all, going on where a killed run stopped; write tables and pictures.

        Returns:
            the files written; None if other processes (``torchrun``) have still cells to make.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        models = load_models(self.out, self.weights, self.device)
        extractor = measuring.extractor(self.weights, self.device)
        reference = measure_digits(extractor, self.seed, self.images)
        wanted = presets()
        measured = {
            name: Sweep(self.out, preset.cells, self.settings(), models, extractor, reference)
            for name, preset in wanted.items()
            if not preset.timing
        }
        for sweep in measured.values():
            sweep.run()
        found = {name: sweep.complete() for name, sweep in measured.items()}
        if None in found.values():
            return None
        # Times are one process' work, after all else: two processes that share a machine slow one another.
        concluding = self.out / PROGRESS / "conclusion"
        concluding.mkdir(exist_ok=True)
        with contextlib.suppress(BeingWrittenError), locked(concluding, 0):
            return self.conclude(wanted, found, models, extractor, reference)
        return None

    def conclude(
        self,
        wanted: dict[str, Preset],
        found: dict[str, list[Entry]],
        models: Models,
        extractor: Extractor,
        reference: Measured,
    ) -> list[Path]:
        """Time, and write everything."""
        written = []
        timing = self.settings(images=TIMED_IMAGES, batch_size=TIMED_IMAGES, timing=True)
        times = f"one batch of {TIMED_IMAGES} a seed, taken apart from the rest"
        for name, preset in wanted.items():
            timed = Sweep(self.out / "timing", preset.cells, timing, models, share=(0, 1)).run()
            entries = timed if preset.timing else with_times(found[name], timed)
            settings = {**(timing if preset.timing else self.settings()).as_json(), "features": extractor.name}
            report = sweep_report.Found(preset, entries, settings, self.command(), times)
            written += sweep_report.write(report, self.out)
        kept = {
            "references.json": self.references(models, extractor, reference),
            "scorers.json": json.loads((self.out / "scorers" / "scorers.json").read_text()),
        }
        for name, values in kept.items():
            write_json(self.out / name, values)
        return [*written, *(self.out / name for name in kept)]

    def command(self) -> str:
        """What makes these figures again."""
        options = {"images": self.images, "seeds": self.repeats, "device": self.device}
        usual = {"images": Demo.images, "seeds": Demo.repeats, "device": Demo.device}
        words = [f"--{name} {value}" for name, value in options.items() if value != usual[name]]
        words += ["--weights WEIGHTS"] if self.weights != WEIGHTS else []
        return " ".join(["varkern demo table --out DIR", *words])

    def references(self, models: Models, extractor: Extractor, reference: Measured) -> dict[str, Any]:
        """What other real digits measure, and real digits that went through the VQ-VAE: the floor of its decoder."""
        vae = models.model("").vae_proxy[0]
        rows: dict[str, list[dict[str, Any]]] = {"real": [], "reconstructed": []}
        for repeat in range(self.repeats):
            others = measuring.RealDigits(self.images, self.seed + 1000 + repeat)
            for name, images in (("real", others), ("reconstructed", Reconstructed(others, vae))):
                report = compare(measure(images, extractor, BATCH_SIZE, self.images), reference, extractor.name)
                rows[name].append(
                    {key: value for key, value in report.as_json().items() if key in sweep_report.FIGURES}
                )
        return rows


def with_times(entries: Sequence[Entry], times: Sequence[Entry]) -> list[Entry]:
    """Figures with the seconds, and the memory, of another sweep of the same cells."""
    joined = []
    for entry, timed in zip(entries, times, strict=True):
        costs = [{name: repeat[name] for name in sweep_report.COSTS} for repeat in timed.repeats]
        joined.append(Entry(entry.cell, [a | b for a, b in zip(entry.repeats, costs, strict=True)]))
    return joined


class Reconstructed(measuring.RealDigits):
    """The same digits as a VQ-VAE gives them back.

    Args:
        digits: the real ones.
        vae: of the demo.
    """

    def __init__(self, digits: measuring.RealDigits, vae: VQVAE):
        self.images, self.labels, self.size = digits.images, digits.labels, digits.size
        self.name, self.vae = f"{digits.name} through the VQ-VAE", vae

    @torch.inference_mode()
    def batches(self, batch_size: int) -> Iterator[Tensor]:
        device = next(self.vae.parameters()).device
        for batch in super().batches(batch_size):
            images = batch.to(device).float() / 127.5 - 1
            yield measuring.as_bytes(self.vae.img_to_reconstructed_img(images, last_one=True)).cpu()
