"""Generating, measuring and timing every cell of a sweep, over one or more runs and by one or more processes.

A unit of work is one part (5,000 images at most) of one cell and seed. It depends only on the settings. Its result,
the moments and sums of the features without the images, is written to a file. When all parts of a cell and seed exist,
they are merged into figures. A killed run continues after the last finished unit.

Under ``torchrun``, rank r of W makes units r, r+W, r+2W, ... No process waits for another: the process that writes the
last part merges the parts, and a process that finds all cells finished returns all figures.

All cells use the same seeds, so they differ only in their settings.
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
from varkern.metrics.gathering import Gathering
from varkern.metrics.statistics import SPLIT, Measured
from varkern.ops import image_seeds
from varkern.progress import progress_bar
from varkern.runs import PROGRESS, SETTINGS, check_settings, claim, find_rank, lock_folder, write_json

from .calibration import CALIBRATION_SEED, density_ratios, in_batches
from .cells import Cell
from .models import Models
from .pictures import to_pixels
from .sampling import autocasting

RESULTS = "results"


@dataclass(frozen=True)
class Settings:
    """The settings that all cells of a sweep share.

    Args:
        images: images per cell and seed. Image i has class ``i % num_classes``.
        repeats: number of seeds; repeat r uses base seed ``seed + r``.
        seed: the first base seed.
        batch_size: images generated at a time.
        options: further arguments of :func:`varkern.generate`: ``cfg``, ``top_k``, ``top_p``.
        autocast: dtype of ``torch.autocast`` during generation; None: no autocast.
        neighbors: number of real and of generated images that precision and recall use; 0: leave both out.
        timing: True: measure only time and memory, after one batch to warm up.
        facts: further JSON values that identify the sweep, such as the device. A folder with other values is refused.
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
        """The values that must be equal to continue in a folder. ``repeats`` is not one of them and may grow."""
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
        """The images of one cell and seed in parts, each one split of the Inception score."""
        return [range(start, min(start + SPLIT, self.images)) for start in range(0, self.images, SPLIT)]


class Unit(NamedTuple):
    """One part of one cell and seed."""

    repeat: int
    cell: Cell
    part: int


class Entry(NamedTuple):
    """A cell and its figures, one dictionary per finished seed."""

    cell: Cell
    repeats: list[dict[str, Any]]


class Sweep:
    """A sweep and its folder.

    Args:
        folder: is made if it does not exist. Sweeps with the same settings can share it; each cell is made once.
        cells: at least one.
        settings: the settings of all cells.
        models: the models and scorers that the cells use.
        extractor: the feature extractor; may be None if ``settings.timing``.
        reference: the measured real images; may be None if ``settings.timing``.
        share: this process' rank and the number of processes; None: those of ``torchrun``.

    Raises:
        ValueError, TypeError, UnsupportedModelError: if an argument is wrong, before any image is made.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
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
        self.place = self.rank if share is None else -1  # number of the lock; -1 is not the number of any rank
        for name, least in (("images", 2), ("repeats", 1), ("batch_size", 1), ("neighbors", 0)):
            if getattr(settings, name) < least:
                raise ValueError(f"{name} must be >= {least}, got {getattr(settings, name)}")
        if not self.cells:
            raise ValueError("cells must have at least one cell, got none")
        if not settings.timing and (extractor is None or reference is None):
            raise ValueError("extractor and reference must be given unless settings.timing is True, got None")
        models.check(self.cells)

    def run(self) -> list[Entry] | None:
        """Make the missing figures; returns all figures, or None if other processes have not finished theirs."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with lock_folder(self.folder, self.place):
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
                    # The part is checked before the result, because it is removed only after the result is written.
                    if not self.has_part(unit) and self.result(unit.cell, unit.repeat) is None:
                        self.make(unit, lambda count: progress.advance(task, count))
                    else:
                        progress.advance(task, len(self.settings.parts()[unit.part]))
                    self.merge(unit.cell, unit.repeat)
        return self.complete()

    def check(self) -> None:
        """Raise if an unfinished cell does not fit its model."""
        repeats = range(self.settings.repeats)
        missing = [cell for cell in self.cells if any(self.result(cell, repeat) is None for repeat in repeats)]
        for name in dict.fromkeys(cell.model for cell in missing):
            for cell in (cell for cell in missing if cell.model == name):
                check(self.models.model(name), cell.search(self.models.scorer(cell), 1.0), **self.options(cell))

    def units(self) -> list[Unit]:
        """All units, seed by seed: a sweep that is stopped early has all cells for its first seeds."""
        parts = range(len(self.settings.parts()))
        return [Unit(r, cell, part) for r in range(self.settings.repeats) for cell in self.cells for part in parts]

    def complete(self) -> list[Entry] | None:
        """All figures; None if some are missing."""
        entries = self.entries()
        return entries if all(len(entry.repeats) == self.settings.repeats for entry in entries) else None

    def entries(self) -> list[Entry]:
        """The figures that exist so far."""
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
        """True if the file of a part exists, because the part is not merged yet.

        Raises:
            ValueError: if it was made with another model or scorer of the same name.
        """
        try:
            notes = Gathering.load(self.part_path(unit))[1]
        except FileNotFoundError:
            return False
        self.compare(unit.cell, notes)
        return True

    def result(self, cell: Cell, repeat: int) -> dict[str, Any] | None:
        """The figures of one cell and seed; None if they do not exist yet.

        Raises:
            ValueError: if they were made with another model or scorer of the same name.
        """
        try:
            result = json.loads(self.result_path(cell, repeat).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        self.compare(cell, result)
        return result

    def compare(self, cell: Cell, made: Mapping[str, Any]) -> None:
        """Raise ``ValueError`` if a part or result was made with another model or scorer than the cell's."""
        facts = self.models.facts(cell)
        check_settings(f"cell {cell.name} in {self.folder}", {name: made.get(name) for name in facts}, facts)

    def make(self, unit: Unit, advance: Callable[[int], None]) -> None:
        """Generate and measure one part, batch by batch, and write its file."""
        settings, cell = self.settings, unit.cell
        model = self.models.model(cell.model)
        device, options = recognise(model).device(model), self.options(cell)
        alpha = self.alpha(model, cell) if cell.needs_alpha else None
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
            for scale, scores in enumerate(made.scores if cell.scores else []):
                if scores is not None and (cell.n == 1 or scale != cell.scale):
                    notes.scored += scores.numel()
                    notes.maps += len(batch)
            if not settings.timing:
                # 8 bits per colour, as if the images were read from files.
                extracted = self.extractor(torch.from_numpy(to_pixels(made.images)).movedim(-1, 1))
                check_finite(extracted, self.extractor, Unstored(cell.name), batch.start)
                if gathering.count == 0 and self.reference.moments is not None:
                    check_fit(extracted, self.reference, self.extractor)
                gathering.add(extracted, batch.start)
                if extracted.logits is not None and extracted.logits.shape[1] == num_classes:
                    notes.hits += int((extracted.logits.argmax(1).cpu() == labels).sum())
                    notes.judged += len(batch)
            advance(0 if settings.timing and len(notes.seconds) == 1 else len(batch))
        if settings.timing:
            del notes.seconds[0]  # the warm-up batch
        path = self.part_path(unit)
        path.parent.mkdir(parents=True, exist_ok=True)
        gathering.save(path, {"notes": asdict(notes), **self.models.facts(cell)})

    def options(self, cell: Cell) -> dict[str, Any]:
        return dict(self.settings.options) | ({} if cell.cfg is None else {"cfg": cell.cfg})

    def merge(self, cell: Cell, repeat: int) -> None:
        """Merge the parts of a cell and seed into its figures, if all parts exist."""
        parts = [self.part_path(Unit(repeat, cell, part)) for part in range(len(self.settings.parts()))]
        path = self.result_path(cell, repeat)
        if path.exists() or not all(part.exists() for part in parts):
            return
        try:
            loaded = [Gathering.load(part) for part in parts]
        except FileNotFoundError:  # another rank has merged them in the meantime
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
        measured = gathering.summarize()
        if measured.features is not None:  # stored on the CPU, where computing their distances is slow
            measured.features = measured.features.to(self.extractor.device)
        report = compare(measured, self.reference, self.extractor.name).as_json()
        parts = {name: value for name, value in (report["fid_parts"] or {}).items() if name != "distance"}
        taken = {name: report[name] for name in ("fid", "sfid", "inception_score", "precision", "recall")}
        return {**taken, **parts, "missing": report["missing"]}

    def alpha(self, model: Any, cell: Cell) -> float:
        """The median alpha of a cell, measured once per folder and without best-of-M at other scales."""
        names = ("n", "scale", "metric", "per", "bandwidth", "cfg", "model")
        path = self.folder / "alpha" / f"{','.join(f'{name}={getattr(cell, name)}' for name in names)}.json"
        if not path.exists():
            with autocasting(model, self.settings.autocast):
                ratios = density_ratios(model, cell, self.options(cell))
            facts = {"alpha": round(float(ratios.median()), 4), "images": len(ratios), "seed": CALIBRATION_SEED}
            write_json(path, facts)
        return float(json.loads(path.read_text(encoding="utf-8"))["alpha"])


@dataclass
class Notes:
    """Further measurements of a part.

    Args:
        alpha: alpha of the density search if it was measured, else None.
        seconds: seconds per image of every batch.
        peak_bytes: peak memory over the batches; 0 on a CPU, where it is not measured.
        dense, searched: number of images that the hybrid density search counted as dense, and of all it searched.
        scored, maps: number of maps that a scorer scored, and of the maps that were chosen by these scores.
        hits, judged: number of images whose most probable class is their label, and of all that were classified.
    """

    alpha: float | None = None
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    dense: int = 0
    searched: int = 0
    scored: int = 0
    maps: int = 0
    hits: int = 0
    judged: int = 0

    def merge(self, other: Notes) -> None:
        self.seconds += other.seconds
        self.peak_bytes = max(self.peak_bytes, other.peak_bytes)
        for name in ("dense", "searched", "scored", "maps", "hits", "judged"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def figures(self) -> dict[str, float | None]:
        """JSON values by name; None if not measured."""
        return {
            "alpha": self.alpha,
            "seconds": statistics.median(self.seconds),
            "peak_bytes": self.peak_bytes or None,
            "dense": self.dense / self.searched if self.searched else None,
            "scored": self.scored / self.maps if self.maps else None,
            "accuracy": self.hits / self.judged if self.judged else None,
        }


class Unstored:
    """Describes an image that has no file, for error messages."""

    def __init__(self, name: str):
        self.name = f"cell {name}"

    def describe(self, number: int) -> str:
        return f"image {number}"


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
