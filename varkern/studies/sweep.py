"""Generating, measuring and timing every cell of a sweep, over one or more runs and by one or more processes.

The work is cut into units: one part (5,000 images at most) of one cell under one seed. A unit is a function of the
settings alone. What is gathered of it, the features' moments and sums but no images, is written to a file; when all
parts of a cell and seed are there they are merged into its figures. A run that was killed keeps what is written. Under
``torchrun`` rank r of W makes units r, r+W, r+2W, ... and no process waits for another: whoever writes the last part
merges, and whoever sees the last cell done has the whole sweep.

All cells see the same seeds, so that a cell differs from another by its search alone.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from varkern.checks import check
from varkern.families import recognise
from varkern.generation import generate
from varkern.metrics.evaluate import check_finite, check_fit, compare
from varkern.metrics.features import Extractor
from varkern.metrics.gathering import Gathering, Measured
from varkern.metrics.statistics import SPLIT, StoredStatistics
from varkern.ops import image_seeds
from varkern.progress import progress_bar
from varkern.runs import PROGRESS, SETTINGS, check_settings, claim, find_rank, locked, write_json

from .calibration import CALIBRATION_SEED, density_ratios, in_batches
from .cells import Cell
from .models import Models
from .pictures import to_pixels
from .sampling import autocasting

RESULTS = "results"


@dataclass(frozen=True)
class Settings:
    """What all cells of a sweep share.

    Args:
        images: of every cell and seed; the classes take turns.
        repeats: seeds; repeat r takes its image seeds from ``seed + r``.
        seed: the first.
        batch_size: images at a time.
        options: further arguments of :func:`varkern.generate`: ``cfg``, ``top_k``, ``top_p``.
        autocast: None, or the dtype to generate under ``torch.autocast`` with.
        neighbors: precision and recall look at the first so many images of either set; 0: not taken.
        timing: True: no figures of quality; every cell generates one batch to warm up and ``images`` timed ones.
        facts: JSON values that belong to the sweep, such as which model's file it is of: a folder made with others is
            refused.
    """

    images: int = 50_000
    repeats: int = 1
    seed: int = 0
    batch_size: int = 25
    options: Mapping[str, Any] = field(default_factory=dict)
    autocast: torch.dtype | None = None
    neighbors: int = 50_000
    timing: bool = False
    facts: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """What must be equal for a folder to be taken up again; the number of seeds may grow."""
        return {
            **self.facts,
            "images": self.images,
            "seed": self.seed,
            "batch_size": self.batch_size,
            **self.options,
            "autocast": None if self.autocast is None else str(self.autocast).removeprefix("torch."),
            "neighbors": self.neighbors,
            "timing": self.timing,
        }

    def parts(self) -> list[range]:
        """The images of one cell and seed in parts; whole splits of the Inception score."""
        return [range(start, min(start + SPLIT, self.images)) for start in range(0, self.images, SPLIT)]


class Unit(NamedTuple):
    """One part of one cell under one seed."""

    repeat: int
    cell: Cell
    part: int


class Entry(NamedTuple):
    """A cell and its figures, one dictionary a seed, as far as they are there."""

    cell: Cell
    repeats: list[dict[str, Any]]


class Sweep:
    """A sweep in its folder.

    Args:
        folder: is made if it is not there. Sweeps of the same settings share it: a cell is made once.
        cells: at least one.
        settings: of all cells.
        models: that the cells name.
        extractor: of features; None if only time is wanted.
        reference: of the real images; None likewise.
        share: this process' number and that of all; None: as ``torchrun`` tells them.

    Raises:
        ValueError, TypeError, UnsupportedModelError: if something is wrong, before any image is made.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        cells: Sequence[Cell],
        settings: Settings,
        models: Models,
        extractor: Extractor | None = None,
        reference: Measured | None = None,
        share: tuple[int, int] | None = None,
    ):
        self.folder, self.cells, self.settings, self.models = Path(folder), list(cells), settings, models
        self.extractor, self.reference = extractor, reference
        self.rank, self.world = find_rank() if share is None else share
        self.place = self.rank if share is None else -1  # of its lock: no rank's
        for name, least in (("images", 2), ("repeats", 1), ("batch_size", 1), ("neighbors", 0)):
            if getattr(settings, name) < least:
                raise ValueError(f"{name} must be >= {least}, got {getattr(settings, name)}")
        if not self.cells:
            raise ValueError("cells must be at least one, got none")
        if not settings.timing and (extractor is None or reference is None):
            raise ValueError("extractor and reference must be given, unless only time is wanted")
        models.check(self.cells)

    def run(self) -> list[Entry] | None:
        """Make what is missing; returns all figures, or None if other processes have still some to make."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder, self.place):
            if (self.folder / SETTINGS).exists():
                claim(self.folder, self.settings.as_json())
            self.check()
            claim(self.folder, self.settings.as_json())
            mine = self.units()[self.rank :: self.world]
            with progress_bar() as progress:
                total = sum(len(self.settings.parts()[unit.part]) for unit in mine)
                task = progress.add_task("images", total=total, note="")
                for unit in mine:
                    progress.update(task, note=f"seed {self.seed_of(unit)}: {unit.cell.name}"[:60])
                    # In this order: a part is removed only after its result is written.
                    if not self.has_part(unit) and self.result(unit.cell, unit.repeat) is None:
                        self.make(unit, lambda count: progress.advance(task, count))
                    else:
                        progress.advance(task, len(self.settings.parts()[unit.part]))
                    self.merge(unit.cell, unit.repeat)
        return self.complete()

    def check(self) -> None:
        """Raise for a cell still to be made that does not fit its model."""
        repeats = range(self.settings.repeats)
        missing = [cell for cell in self.cells if any(self.result(cell, repeat) is None for repeat in repeats)]
        for name in dict.fromkeys(cell.model for cell in missing):
            for cell in (cell for cell in missing if cell.model == name):
                check(self.models.model(name), cell.search(self.models.scorer(cell), 1.0), **self.options(cell))

    def units(self) -> list[Unit]:
        """All units; seeds go around the cells, so that a sweep cut short is whole in the seeds that it has."""
        parts = range(len(self.settings.parts()))
        return [Unit(r, cell, part) for r in range(self.settings.repeats) for cell in self.cells for part in parts]

    def complete(self) -> list[Entry] | None:
        """All figures, or None if some are missing."""
        entries = self.entries()
        return entries if all(len(entry.repeats) == self.settings.repeats for entry in entries) else None

    def entries(self) -> list[Entry]:
        """The figures that are there."""
        found = []
        for cell in self.cells:
            results = [self.result(cell, repeat) for repeat in range(self.settings.repeats)]
            found.append(Entry(cell, [result for result in results if result is not None]))
        return found

    def seed_of(self, unit: Unit) -> int:
        return self.settings.seed + unit.repeat

    def result_path(self, cell: Cell, repeat: int) -> Path:
        return self.folder / RESULTS / cell.name / f"seed-{self.settings.seed + repeat}.json"

    def part_path(self, unit: Unit) -> Path:
        name = f"seed-{self.seed_of(unit)}-part-{unit.part}.safetensors"
        return self.folder / PROGRESS / unit.cell.name / name

    def has_part(self, unit: Unit) -> bool:
        """True if a part waits to be merged.

        Raises:
            ValueError: if it was made with another model or scorer of that name.
        """
        try:
            notes = Gathering.load(self.part_path(unit))[1]
        except FileNotFoundError:
            return False
        self.compare(unit.cell, notes)
        return True

    def result(self, cell: Cell, repeat: int) -> dict[str, Any] | None:
        """The figures of one cell and seed; None if they are not there.

        Raises:
            ValueError: if they were made with another model or scorer of that name.
        """
        try:
            result = json.loads(self.result_path(cell, repeat).read_text())
        except FileNotFoundError:
            return None
        self.compare(cell, result)
        return result

    def compare(self, cell: Cell, made: Mapping[str, Any]) -> None:
        """Raise ``ValueError`` unless what was made of a cell was made with its model and scorer."""
        facts = self.models.facts(cell)
        check_settings(f"cell {cell.name} in {self.folder}", {name: made.get(name) for name in facts}, facts)

    def make(self, unit: Unit, advance: Callable[[int], None]) -> None:
        """Generate one part, batch by batch, and write what is gathered of it."""
        settings, cell = self.settings, unit.cell
        model = self.models.model(cell.model)
        device, options = recognise(model).device(model), self.options(cell)
        alpha = self.alpha(model, cell) if cell.wants_alpha else None
        search = cell.search(self.models.scorer(cell), alpha)
        num_classes = check(model, search, **options).num_classes
        seeds = image_seeds(self.seed_of(unit), settings.images)
        gathering, notes = Gathering(settings.neighbors), Notes(alpha=alpha)
        batches = in_batches(settings.parts()[unit.part], settings.batch_size)
        for batch in batches[:1] * settings.timing + batches:
            labels = torch.arange(batch.start, batch.stop) % num_classes
            reset_peak(device)
            with autocasting(model, settings.autocast):
                made = generate(model, labels, search=search, seeds=seeds[batch.start : batch.stop], **options)
            notes.seconds.append(sum(made.seconds) / len(batch))
            notes.peak_bytes = max(notes.peak_bytes, peak(device))
            if cell.n != 1 and cell.strategy == "hybrid":
                notes.dense += int(cell.density(alpha).dense(made.scores[cell.scale]).sum())
                notes.searched += len(batch)
            if not settings.timing:
                # As they are when read back from files: 8 bits a colour.
                extracted = self.extractor(torch.from_numpy(to_pixels(made.images)).movedim(-1, 1))
                check_finite(extracted, self.extractor, Unstored(cell.name), batch.start)
                if gathering.count == 0 and self.reference.moments is not None:
                    wanted = StoredStatistics(self.reference.moments, self.reference.spatial, None, None)
                    check_fit(extracted, wanted, self.extractor)
                gathering.add(extracted, batch.start)
                if extracted.logits is not None and extracted.logits.shape[1] == num_classes:
                    notes.hits += int((extracted.logits.argmax(1).cpu() == labels).sum())
                    notes.judged += len(batch)
            advance(0 if settings.timing and len(notes.seconds) == 1 else len(batch))
        if settings.timing:
            del notes.seconds[0]  # the batch that warmed up
        path = self.part_path(unit)
        path.parent.mkdir(parents=True, exist_ok=True)
        gathering.save(path, {"notes": asdict(notes), **self.models.facts(cell)})

    def options(self, cell: Cell) -> dict[str, Any]:
        return dict(self.settings.options) | ({} if cell.cfg is None else {"cfg": cell.cfg})

    def merge(self, cell: Cell, repeat: int) -> None:
        """Make the figures of a cell and seed if all its parts are there."""
        parts = [self.part_path(Unit(repeat, cell, part)) for part in range(len(self.settings.parts()))]
        path = self.result_path(cell, repeat)
        if path.exists() or not all(part.exists() for part in parts):
            return
        try:
            loaded = [Gathering.load(part) for part in parts]
        except FileNotFoundError:  # another rank has merged them meanwhile
            return
        whole, notes = Gathering(self.settings.neighbors), Notes(alpha=loaded[0][1]["notes"]["alpha"])
        for part, stored in loaded:
            self.compare(cell, stored)
            whole.merge(part)
            notes.merge(Notes(**stored["notes"]))
        result = {
            "cell": cell.settings,
            "seed": self.settings.seed + repeat,
            **self.models.facts(cell),
            **({} if self.settings.timing else self.figures(whole)),
            **notes.figures(),
        }
        write_json(path, result)
        for made in parts:
            made.unlink(missing_ok=True)

    def figures(self, gathering: Gathering) -> dict[str, Any]:
        """FID and its parts, sFID, Inception score, precision and recall."""
        measured = gathering.measured()
        if measured.features is not None:  # stored on the CPU, too slow a place for their distances
            measured.features = measured.features.to(self.extractor.device)
        report = compare(measured, self.reference, self.extractor.name).as_json()
        parts = {name: value for name, value in (report["fid_parts"] or {}).items() if name != "distance"}
        taken = {name: report[name] for name in ("fid", "sfid", "inception_score", "precision", "recall")}
        return {**taken, **parts, "missing": report["missing"]}

    def alpha(self, model: Any, cell: Cell) -> float:
        """The median alpha of a cell's samples, found once a folder, without best-of-M at the scales before."""
        names = ("n", "scale", "metric", "per", "bandwidth", "cfg", "model")
        path = self.folder / "alpha" / f"{','.join(f'{name}={getattr(cell, name)}' for name in names)}.json"
        if not path.exists():
            with autocasting(model, self.settings.autocast):
                ratios = density_ratios(model, cell, self.options(cell))
            facts = {"alpha": round(float(ratios.median()), 4), "images": len(ratios), "seed": CALIBRATION_SEED}
            write_json(path, facts)
        return float(json.loads(path.read_text())["alpha"])


@dataclass
class Notes:
    """What is noted of a part beside its features.

    Args:
        alpha: of the density search, where it was found by rule.
        seconds: an image, of every batch.
        peak_bytes: the most memory that a batch took; 0 where nobody counts, on a CPU.
        dense, searched: images that the hybrid found dense, of how many.
        hits, judged: images whose most probable class is the wanted one, of how many.
    """

    alpha: float | None = None
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    dense: int = 0
    searched: int = 0
    hits: int = 0
    judged: int = 0

    def merge(self, other: Notes) -> None:
        self.seconds += other.seconds
        self.peak_bytes = max(self.peak_bytes, other.peak_bytes)
        for name in ("dense", "searched", "hits", "judged"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def figures(self) -> dict[str, float | None]:
        """JSON values by name; None where there is nothing to tell."""
        return {
            "alpha": self.alpha,
            "seconds": statistics.median(self.seconds),
            "peak_bytes": self.peak_bytes or None,
            "dense": self.dense / self.searched if self.searched else None,
            "accuracy": self.hits / self.judged if self.judged else None,
        }


class Unstored:
    """How an error names an image that has no file."""

    def __init__(self, name: str):
        self.name = f"cell {name}"

    def describe(self, number: int) -> str:
        return f"image {number}"


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
