"""``varkern sweep``: what a search does to a model's images, and what it costs, cell by cell."""

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
from varkern.metrics.evaluate import PUBLISHED_IMAGES, measure_reference
from varkern.metrics.features import Extractor
from varkern.metrics.gathering import Measured
from varkern.models import load_var
from varkern.runs import describe_file, find_rank, open_folder
from varkern.scorer import Scorer
from varkern.studies import report as sweep_report
from varkern.studies.models import Models
from varkern.studies.presets import PRESETS, WITH_FIRST_SCALE, WITHOUT_FIRST_SCALE, Preset
from varkern.studies.settings import SweepSettings, read
from varkern.studies.sweep import Settings, Sweep
from varkern.tables import markdown_table

from . import scorer as scorer_commands
from .evaluate import find_extractor, open_reference
from .options import DTYPES, Device, Vae, pick_local_device

ACCURACIES = "lsrs-table10"  # a table of scorers, not of images
TIMED = 24  # images of a batch, as in LSRS, Fig. 6


def sweep(
    out: Annotated[Path | None, typer.Option(help="Folder for figures, tables and pictures")] = None,
    preset: Annotated[
        str | None, typer.Option(help=f"Table of the papers to measure: {', '.join(PRESETS)}, {ACCURACIES}")
    ] = None,
    settings: Annotated[
        Path | None, typer.Option(help="TOML file of settings: a grid of searches, and any other setting; see --show")
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="Print all settings as a TOML file and exit")] = False,
    var: Annotated[
        list[str] | None, typer.Option(help="VAR checkpoint or name, or several as d16=FILE; default: demo")
    ] = None,
    vae: Vae = None,
    scorer: Annotated[
        list[str] | None, typer.Option(help="Scorer's file, or several by the preset's names as pointwise=FILE")
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(help="Real images or statistics, as in `varkern evaluate`; default: demo's digits")
    ] = None,
    features: Annotated[
        str | None, typer.Option(help="Feature extractor: inception, demo or module:function; default: by model")
    ] = None,
    images: Annotated[
        int | None, typer.Option(help="Number of images per cell and seed; default: 50000, of demo 2000")
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="Number of repeats of every cell; default: 3")] = None,
    max_m: Annotated[
        int | None, typer.Option(help="Largest number of candidates; cells of more are left out; default: all")
    ] = None,
    device: Device = "auto",
) -> None:
    """Generate, measure and time every cell of a paper's table or of a grid: Markdown, CSV, JSON and a picture.

    What to measure is a preset or a settings file; the other options replace what the file says. A killed run continues
    where it stopped. Under `torchrun --nproc-per-node 8 -- $(which varkern) sweep ...` processes share the cells.
    Tables of the same settings share a folder.
    """
    line = {
        "preset": preset,
        "var": by_name("var", var),
        "vae": vae and str(vae),
        "scorer": by_name("scorer", scorer),
        "reference": reference and str(reference),
        "features": features,
        "images": images,
        "seeds": seeds,
        "max_m": max_m,
    }
    in_file = {} if settings is None else read(settings)
    given = SweepSettings(**in_file | {name: value for name, value in line.items() if value is not None})
    chosen, table = (given, None) if given.preset == ACCURACIES else resolve(given)
    if show:
        print(chosen.as_toml(), end="")
        return
    if out is None:
        raise ValueError("out must be given: the folder for figures, tables and pictures")
    require_matplotlib()
    if table is None:
        accuracies(out, chosen, device)
    else:
        measure(out, chosen, table, pick_local_device(device))


def by_name(option: str, texts: Sequence[str] | None) -> str | dict[str, str] | None:
    """One file as it is, or several by name: ``NAME=FILE``, or the file's own text where there is no name.

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
    """The settings with every default filled in, and the cells.

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
        refuse(f"{given.preset} has cells of its own", {"grid": given.grid or None})
        table = find_preset(given.preset, demo, given.max_m)
    refuse(f"only {ACCURACIES} takes token maps", {"real": given.real, "generated": given.generated})
    if all(cell.n == 1 for cell in table.cells):
        refuse("only density searches have it", {"alpha": given.alpha, "min_distance": given.min_distance})
    usual = {"cfg": table.cfg if given.preset else 1.5, "top_k": table.top_k, "top_p": table.top_p}
    if demo:
        from varkern.demo.train import SAMPLING

        usual = {**SAMPLING, "top_k": 0}
    if table.timing:
        measured = {name: getattr(given, name) for name in ("images", "batch_size", "reference", "features")}
        refuse(f"{given.preset} takes times alone, of one batch of {TIMED}", measured)
    else:
        usual |= {"images": 2000, "batch_size": 100} if demo else {"images": PUBLISHED_IMAGES, "batch_size": 25}
        usual["features"] = "demo" if demo else "inception"
    usual = {name: value for name, value in usual.items() if getattr(given, name) is None}
    return replace(given, **usual), restrict(table, given.alpha, given.min_distance, given.max_m)


def measure(out: Path, chosen: SweepSettings, table: Preset, where: torch.device) -> None:
    """Run the sweep and write its tables."""
    if table.timing and find_rank()[0] > 0:  # processes that share a machine slow one another
        print("times are taken by the first process")
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
        table = without_missing(table, models)
    extractor = real_images = None
    if not timing:
        extractor = find_extractor(chosen.features, where, None)
        facts = {"features": chosen.features, "reference": facts_of_reference(chosen.reference)}
        facts |= {"features_of": demo_weights()} if chosen.features == "demo" else {}
        settings = replace(settings, facts={**settings.facts, **facts})
        real_images = find_reference(chosen.reference, demo, extractor, settings)
    folder = out / "timing" if timing else out
    open_folder(folder)
    entries = Sweep(folder, table.cells, settings, models, extractor, real_images, (0, 1) if timing else None).run()
    if entries is None:
        print("other processes have still cells to make; the last one writes the tables")
        return
    times = f"one batch of {TIMED} a seed" if timing else "the median over batches"
    found = sweep_report.Found(table, entries, settings.as_json(), command_line(), times)
    paths = sweep_report.write(found, out)
    print(sweep_report.page(found))
    print(f"wrote {', '.join(map(str, paths))}")


def load_models_lazily(chosen: SweepSettings, device: torch.device) -> Models:
    """Models and scorers by name, each loaded when it is first wanted."""
    files, judges = ({"": given} if isinstance(given, str) else given or {} for given in (chosen.var, chosen.scorer))
    if chosen.var == "demo":
        judges = {"": str(demo_run.WEIGHTS / "scorer.safetensors"), **judges}
    load = partial(load_var, vae=chosen.vae, device=device, dtype=DTYPES[chosen.dtype])
    return Models(
        {name: partial(load, path) for name, path in files.items()},
        {name: partial(Scorer.from_pretrained, path, device=device) for name, path in judges.items()},
        {name: file_sha256(Path(path))[:16] for name, path in judges.items()},
        {name: demo_weights() if path == "demo" else describe_file(path) for name, path in files.items()},
    )


def refuse(reason: str, options: dict[str, Any]) -> None:
    """Raise ``ValueError`` for the first option that is given and would do nothing."""
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"{name} must not be given: {reason}, got {value}")


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def demo_weights() -> str:
    from varkern.demo.measuring import fingerprint

    return fingerprint(demo_run.WEIGHTS)


def facts_of_reference(reference: str | None) -> dict[str, Any] | str:
    if reference is None:
        return "the demo's digits"
    return str(Path(reference).resolve()) if Path(reference).is_dir() else describe_file(reference)


def find_preset(name: str, demo: bool, max_m: int | None) -> Preset:
    """The preset; of the demo model as the demo has it.

    Raises:
        ValueError: if there is none such.
    """
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, {ACCURACIES}, got {name!r}")
    if not demo:
        return PRESETS[name]
    from varkern.demo.measuring import MOST_CANDIDATES, adapt_preset

    whole = PRESETS[name]
    kept = adapt_preset(whole, MOST_CANDIDATES if max_m is None else max_m)
    if len(kept.rows) < len(whole.rows):
        print(
            f"left out: {len(whole.rows) - len(kept.rows)} cells that the demo lacks scales for, or of too many "
            "candidates (--max-m)",
            file=sys.stderr,
        )
    return kept


def restrict(preset: Preset, alpha: float | str | None, min_distance: float | None, max_m: int | None) -> Preset:
    """The preset with a user's alpha and distance, without cells of too many candidates.

    Raises:
        ValueError: if nothing is left.
    """
    changed = {"alpha": alpha, "min_distance": min_distance}
    rows = []
    for cell, printed in preset.rows:
        if cell.n != 1:
            cell = replace(cell, **{name: value for name, value in changed.items() if value is not None})
        if max_m is None or cell.most_candidates() <= max_m:
            rows.append((cell, printed))
    if not rows:
        raise ValueError(f"max_m must leave at least one cell, got {max_m}")
    if len(rows) < len(preset.rows):
        print(f"left out: {len(preset.rows) - len(rows)} cells of more than {max_m} candidates", file=sys.stderr)
    return replace(preset, rows=tuple(rows))


def without_missing(preset: Preset, models: Models) -> Preset:
    """The preset without cells of models that are not given, and of scales that a model lacks: the papers' have ten.

    Raises:
        ValueError: if nothing is left, or a scorer is wanted that is not given.
    """
    given = [row for row in preset.rows if row[0].model in models.models]
    if not given:
        models.check(preset.cells)
    models.check([cell for cell, _ in given])
    rows = tuple(row for row in given if row[0].fits(models.num_scales(row[0].model)))
    for number, of in ((len(preset.rows) - len(given), "models not given"), (len(given) - len(rows), "lacking scales")):
        if number:
            print(f"left out: {number} cells of {of}", file=sys.stderr)
    return replace(preset, rows=rows)


def find_reference(reference: str | None, demo: bool, extractor: Extractor, settings: Settings) -> Measured:
    """What the real images measure.

    Raises:
        ValueError: if there are none, or they are statistics of other features.
    """
    if reference is None and demo:
        from varkern.demo.measuring import measure_digits

        return measure_digits(extractor, settings.seed, settings.neighbors)
    if reference is None:
        raise ValueError("reference must be given: real images, or their statistics")
    images, stored = open_reference(Path(reference))
    if stored is not None and stored.features not in (None, extractor.name):
        raise ValueError(f"reference holds statistics of features {stored.features!r}, not {extractor.name!r}")
    return measure_reference(images, stored, extractor, settings.batch_size, settings.neighbors)


def accuracies(out: Path, chosen: SweepSettings, device: str) -> None:
    """LSRS, Table 10, which is ``varkern scorer report`` of two scorers."""
    places = {name: getattr(chosen, name) for name in ("real", "generated", "vae")}
    missing = [name for name, value in places.items() if value is None]
    judges = chosen.scorer if isinstance(chosen.scorer, dict) else {}
    if missing or set(judges) != {"with", "without"}:
        raise ValueError(
            f"{ACCURACIES} wants a settings file with real, generated, vae and scorer = {{ with = FILE, without = FILE "
            f"}}: scorers trained with the first scale and without; got no {', '.join(missing) or 'such two'}"
        )
    scorer_commands.report(
        scorer=Path(judges["with"]),
        **{name: Path(place) for name, place in places.items()},
        out=out,
        against=Path(judges["without"]),
        features=None,
        first_scale=None,
        batch_size=128,
        device=device,
        verify=False,
    )
    print("The paper: virtually no difference. Its accuracies, of VAR on ImageNet:\n")
    pairs = enumerate(zip(WITH_FIRST_SCALE, WITHOUT_FIRST_SCALE, strict=True))
    rows = [[scale, f"{first:.3f}", "-" if second is None else f"{second:.3f}"] for scale, (first, second) in pairs]
    print(markdown_table(["scale", "with", "without"], rows), end="")


def command_line() -> str:
    """The command as it was given, without where its files went."""
    words = iter(sys.argv[1:])
    kept = []
    for word in words:
        if word == "--out":
            next(words, None)
        elif not word.startswith("--out="):
            kept.append(word)
    return " ".join(["varkern", *kept, "--out DIR"])
