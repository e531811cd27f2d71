"""``varkern sweep``: the effect of searches on a model's images, and their cost, for every cell of a grid."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from varkern.data import file_sha256
from varkern.demo import run as demo_run
from varkern.extras import require_matplotlib
from varkern.hub import locate
from varkern.metrics.evaluate import PUBLISHED_IMAGES, measure_reference
from varkern.metrics.features import Extractor
from varkern.metrics.statistics import Measured
from varkern.models import load_var
from varkern.runs import describe_file, find_rank, open_folder
from varkern.scorer import Scorer
from varkern.studies import report as sweep_report
from varkern.studies.models import Models
from varkern.studies.presets import PRESETS, Preset
from varkern.studies.settings import SweepSettings, read
from varkern.studies.sweep import Settings, Sweep

from .evaluate import find_extractor, open_reference
from .options import DTYPES, Device, Vae, pick_local_device

TIMED = 24  # images per batch, as in LSRS, Fig. 6


def sweep(
    out: Annotated[Path | None, typer.Option(help="Folder for figures, tables and pictures")] = None,
    preset: Annotated[str | None, typer.Option(help=f"Table of the papers: {', '.join(PRESETS)}")] = None,
    settings: Annotated[
        Path | None, typer.Option(help="TOML file with grids of searches and other settings; see --show")
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="Print all settings as a TOML file and exit")] = False,
    var: Annotated[
        list[str] | None,
        typer.Option(help="VAR checkpoint or name, or several as d16=FILE; default: demo"),
    ] = None,
    vae: Vae = None,
    scorer: Annotated[
        list[str] | None,
        typer.Option(help="Scorer, as for `varkern sample`; several, by the names of the preset, as pointwise=FILE"),
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(help="Real images or their statistics, as in `varkern evaluate`; default: demo's digits"),
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(help="Feature extractor: inception, demo or module:function; default: by model"),
    ] = None,
    images: Annotated[
        int | None, typer.Option(help="Number of images per cell and seed; default: 2000 for the demo, else 50000")
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="Number of seeds per cell; default: 3")] = None,
    max_m: Annotated[
        int | None, typer.Option(help="Largest number of candidates of the cells to measure; default: no limit")
    ] = None,
    device: Device = "auto",
) -> None:
    """Generate, measure and time every cell of a paper's table or of a grid; write Markdown, CSV, JSON and a plot.

    A preset or a settings file gives the cells; the other options replace those of the file. A killed run continues
    where it stopped. Under `torchrun --nproc-per-node 8 -- $(which varkern) sweep ...` processes share the cells.
    Tables with the same settings can share a folder.
    """
    line = {
        "preset": preset,
        "var": parse_files("var", var),
        "vae": vae and str(vae),
        "scorer": parse_files("scorer", scorer),
        "reference": reference and str(reference),
        "features": features,
        "images": images,
        "seeds": seeds,
        "max_m": max_m,
    }
    in_file = {} if settings is None else read(settings)
    given = SweepSettings(**in_file | {name: value for name, value in line.items() if value is not None})
    chosen, table = resolve(given)
    if show:
        print(chosen.as_toml(), end="")
        return
    if out is None:
        raise ValueError("out must be a folder for figures, tables and pictures, got none")
    require_matplotlib("measure")
    measure(out, chosen, table, pick_local_device(device))


def parse_files(option: str, texts: Sequence[str] | None) -> str | dict[str, str] | None:
    """Parse one file, or several as ``NAME=FILE``; a file without a name gets its path as name.

    Raises:
        ValueError: if a name comes twice.
    """
    found: dict[str, str] = {}
    for text in texts or []:
        match = re.fullmatch(r"([\w.-]+)=(.+)", text)
        name, path = (match[1], match[2]) if match else ("" if len(texts) == 1 else text, text)
        if name in found:
            raise ValueError(f"{option} must have different names, got {name!r} twice")
        found[name] = path
    return found[""] if list(found) == [""] else found or None


def resolve(given: SweepSettings) -> tuple[SweepSettings, Preset]:
    """Fill in the defaults of the settings, and find the cells.

    Raises:
        ValueError: if settings do not fit each other, or no cell is left.
    """
    for name, value in (("dtype", given.dtype), ("autocast", given.autocast)):
        if value is not None and value not in DTYPES:
            raise ValueError(f"{name} must be one of {', '.join(DTYPES)}, got {value!r}")
    demo = given.var == "demo"
    if given.preset is None:
        table = given.cells()
    else:
        refuse(f"the preset {given.preset} defines the cells", {"grid": given.grid or None})
        table = find_preset(given.preset, demo, given.max_m)
    if all(cell.n == 1 for cell in table.cells):
        refuse("only density searches use it", {"alpha": given.alpha, "min_distance": given.min_distance})
    usual = {"cfg": table.cfg if given.preset else 1.5, "top_k": table.top_k, "top_p": table.top_p}
    if demo:
        from varkern.demo.train import SAMPLING

        usual = {**SAMPLING, "top_k": 0}
    if table.timing:
        measured = {name: getattr(given, name) for name in ("images", "batch_size", "reference", "features")}
        refuse(f"the preset {given.preset} only measures the time of one batch of {TIMED}", measured)
    else:
        usual |= {"images": 2000, "batch_size": 100} if demo else {"images": PUBLISHED_IMAGES, "batch_size": 25}
        usual["features"] = "demo" if demo else "inception"
    usual = {name: value for name, value in usual.items() if getattr(given, name) is None}
    return replace(given, **usual), restrict(table, given.alpha, given.min_distance, given.max_m)


def measure(out: Path, chosen: SweepSettings, table: Preset, where: torch.device) -> None:
    """Run the sweep and write its tables."""
    if table.timing and find_rank()[0] > 0:  # processes on one machine slow each other down
        print("only the first process measures times")
        return
    demo, timing = chosen.var == "demo", table.timing
    images = TIMED if timing else chosen.images
    settings = Settings(
        images,
        chosen.seeds,
        chosen.seed,
        TIMED if timing else chosen.batch_size,
        {"cfg": chosen.cfg, "top_k": chosen.top_k, "top_p": chosen.top_p},
        DTYPES.get(chosen.autocast),
        0 if timing else min(chosen.neighbors, images),
        timing,
        {"vae": describe_file(chosen.vae), "dtype": chosen.dtype, "device": device_name(where)},
    )
    models = load_models_lazily(chosen, where)
    if chosen.preset is not None:
        table = drop_missing(table, models)
    extractor = real_images = None
    if not timing:
        extractor = find_extractor(chosen.features, where, None)
        facts = {"features": chosen.features, "reference": describe_reference(chosen.reference)}
        facts |= {"features_of": demo_weights()} if chosen.features == "demo" else {}
        settings = replace(settings, facts={**settings.facts, **facts})
        real_images = find_reference(chosen.reference, demo, extractor, settings)
    folder = out / "timing" if timing else out
    open_folder(folder)
    entries = Sweep(folder, table.cells, settings, models, extractor, real_images, (0, 1) if timing else None).run()
    if entries is None:
        print("other processes are still working; the last one writes the tables")
        return
    times = f"one batch of {TIMED} per seed" if timing else "the median over batches"
    found = sweep_report.Found(table, entries, settings.as_json(), command_line(), times)
    paths = sweep_report.write(found, out)
    print(sweep_report.page(found))
    print(f"wrote {', '.join(map(str, paths))}")


def load_models_lazily(chosen: SweepSettings, device: torch.device) -> Models:
    """Return models and scorers by name, each loaded at its first use."""
    files, scorers = ({"": given} if isinstance(given, str) else given or {} for given in (chosen.var, chosen.scorer))
    if chosen.var == "demo":
        scorers = {"": str(demo_run.WEIGHTS / "scorer.safetensors"), **scorers}
    scorers = {name: locate(source) for name, source in scorers.items()}
    load = partial(load_var, vae=chosen.vae, device=device, dtype=DTYPES[chosen.dtype])
    return Models(
        {name: partial(load, path) for name, path in files.items()},
        {name: partial(Scorer.from_pretrained, path, device=device) for name, path in scorers.items()},
        {name: file_sha256(path)[:16] for name, path in scorers.items()},
        {name: demo_weights() if path == "demo" else describe_file(path) for name, path in files.items()},
    )


def refuse(reason: str, options: dict[str, Any]) -> None:
    """Raise ``ValueError`` for the first of ``options`` that was given, because it would have no effect."""
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"{name} must not be given: {reason}, got {value}")


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def demo_weights() -> str:
    from varkern.demo.measuring import fingerprint

    return fingerprint(demo_run.WEIGHTS)


def describe_reference(reference: str | None) -> dict[str, Any] | str:
    if reference is None:
        return "the demo's digits"
    return str(Path(reference).resolve()) if Path(reference).is_dir() else describe_file(reference)


def find_preset(name: str, demo: bool, max_m: int | None) -> Preset:
    """Return the preset; for the demo model, adapted to its scales.

    Raises:
        ValueError: if there is no such preset.
    """
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    if not demo:
        return PRESETS[name]
    from varkern.demo.measuring import MOST_CANDIDATES, adapt_preset

    kept = adapt_preset(PRESETS[name], MOST_CANDIDATES if max_m is None else max_m)
    report_left_out(PRESETS[name], kept, "scales that the demo does not have, or with too many candidates (--max-m)")
    return kept


def restrict(preset: Preset, alpha: float | str | None, min_distance: float | None, max_m: int | None) -> Preset:
    """Apply alpha and the distance to the density cells, and drop cells with too many candidates.

    Raises:
        ValueError: if no cell is left.
    """
    given = {"alpha": alpha, "min_distance": min_distance}
    changed = {name: value for name, value in given.items() if value is not None}
    rows = tuple((replace(cell, **changed) if cell.n != 1 else cell, printed) for cell, printed in preset.rows)
    kept = replace(preset, rows=rows).keep(lambda cell: max_m is None or cell.most_candidates() <= max_m)
    if not kept.rows:
        raise ValueError(f"max_m must leave at least one cell, got {max_m}")
    report_left_out(preset, kept, f"more than {max_m} candidates")
    return kept


def drop_missing(preset: Preset, models: Models) -> Preset:
    """Drop cells of models that are not given, and of scales that a model does not have.

    Raises:
        ValueError: if no cell is left, or a scorer of a cell is not given.
    """
    given = preset.keep(lambda cell: cell.model in models.models)
    models.check(given.cells or preset.cells)
    report_left_out(preset, given, "models that are not given")
    kept = given.keep(lambda cell: cell.fits(models.num_scales(cell.model)))
    report_left_out(given, kept, "missing scales")
    return kept


def report_left_out(whole: Preset, kept: Preset, reason: str) -> None:
    if number := len(whole.rows) - len(kept.rows):
        print(f"left out: {number} cells with {reason}", file=sys.stderr)


def find_reference(reference: str | None, demo: bool, extractor: Extractor, settings: Settings) -> Measured:
    """Measure the real images.

    Raises:
        ValueError: if there are none, or only statistics of other features.
    """
    if reference is None and demo:
        from varkern.demo.measuring import measure_digits

        return measure_digits(extractor, settings.seed, settings.neighbors)
    if reference is None:
        raise ValueError("reference must be real images or their statistics, got none")
    images, stored = open_reference(Path(reference))
    if stored is not None and stored.extractor not in (None, extractor.name):
        raise ValueError(f"reference must hold statistics of features {extractor.name!r}, got {stored.extractor!r}")
    return measure_reference(images, stored, extractor, settings.batch_size, settings.neighbors)


def command_line() -> str:
    """Return the command line with ``DIR`` for the folder."""
    words = iter(sys.argv[1:])
    kept = []
    for word in words:
        if word == "--out":
            next(words, None)
        elif not word.startswith("--out="):
            kept.append(word)
    return " ".join(["varkern", *kept, "--out DIR"])
