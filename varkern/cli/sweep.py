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
from varkern.metrics.evaluate import PUBLISHED_IMAGES, measured_reference
from varkern.metrics.features import Extractor
from varkern.metrics.gathering import Measured
from varkern.models import load_var
from varkern.runs import describe_file, find_rank, open_folder
from varkern.scorer import Scorer
from varkern.studies import report as sweep_report
from varkern.studies.cells import MEDIAN, Cell, grid, unique
from varkern.studies.models import Models
from varkern.studies.presets import PRESETS, WITH_FIRST_SCALE, WITHOUT_FIRST_SCALE, Preset
from varkern.studies.sweep import Settings, Sweep
from varkern.tables import markdown_table

from . import scorer as scorer_commands
from .evaluate import find_extractor, open_reference
from .options import DTYPES, Device, Dtype, Seed, parse_pick, pick_local_device

ACCURACIES = "lsrs-table10"  # a table of scorers, not of images
TIMED = 24  # images of a batch, as in LSRS, Fig. 6


def sweep(
    out: Annotated[Path, typer.Option(help="Folder for figures, tables and pictures")],
    preset: Annotated[
        str | None, typer.Option(help=f"A table of the papers: {', '.join(PRESETS)}, {ACCURACIES}")
    ] = None,
    m: Annotated[str | None, typer.Option(help="Candidates M: 1,2,4,8; one number a scale as 1:4:8:4:2")] = None,
    first_scale: Annotated[str | None, typer.Option(help="First searched scales, from 0: 0,1,2; default: 1")] = None,
    pick: Annotated[str | None, typer.Option(help="best, resample, k (resample among k); default: best")] = None,
    n: Annotated[str | None, typer.Option(help="Candidates of density searches: 20,50,100")] = None,
    scale: Annotated[str | None, typer.Option(help="Where they search, from 0; default: 1")] = None,
    strategy: Annotated[str | None, typer.Option(help="hybrid, top, random, small, rank; default: hybrid")] = None,
    alpha: Annotated[
        str | None, typer.Option(help="Of the hybrid; median: found so that half of the images are dense")
    ] = None,
    min_distance: Annotated[float | None, typer.Option(help="Between representatives; default: the search's")] = None,
    var: Annotated[
        list[str] | None,
        typer.Option(help="A checkpoint, d16 to d36, or several as d16=FILE; default: demo"),
    ] = None,
    vae: Annotated[Path | None, typer.Option(help="The VQ-VAE's checkpoint; not needed for short names")] = None,
    scorer: Annotated[
        list[str] | None, typer.Option(help="A scorer; several, as a preset names them: pointwise=FILE")
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(help="Real images or statistics, as in `varkern evaluate`; default: demo's digits"),
    ] = None,
    features: Annotated[
        str | None, typer.Option(help="inception, demo or module:function; default: inception; of demo: demo")
    ] = None,
    images: Annotated[int | None, typer.Option(help="Images a cell and seed; default: 50000; of demo 2000")] = None,
    seeds: Annotated[int, typer.Option(help="Repeats of every cell")] = 3,
    seed: Seed = 0,
    max_m: Annotated[
        int | None, typer.Option(help="Leave out cells of more candidates; default: all; of demo's presets 256")
    ] = None,
    cfg: Annotated[float | None, typer.Option(help="Guidance; default: the preset's, else 1.5; of demo 0")] = None,
    top_k: Annotated[int | None, typer.Option(help="The k most probable; 0: all; default: 900; of demo 0")] = None,
    top_p: Annotated[float, typer.Option(help="Then the most probable up to this mass; 0: all")] = 0.96,
    batch_size: Annotated[int | None, typer.Option(help="Images at a time; default: 25; of demo 100")] = None,
    neighbors: Annotated[int, typer.Option(help="Precision and recall look at so many; 0: none")] = PUBLISHED_IMAGES,
    real: Annotated[Path | None, typer.Option(help=f"Real token maps, for {ACCURACIES}")] = None,
    generated: Annotated[Path | None, typer.Option(help=f"Generated token maps, for {ACCURACIES}")] = None,
    device: Device = "auto",
    dtype: Annotated[Dtype, typer.Option(help="Of the weights")] = "float32",
    autocast: Annotated[Dtype | None, typer.Option(help="Generate under torch.autocast with this dtype")] = None,
) -> None:
    """Generate, measure and time every cell of a grid or of a paper's table: Markdown, CSV, JSON and a picture.

    A killed run goes on where it stopped. Processes share the cells under `torchrun --nproc-per-node 8 -- $(which
    varkern) sweep ...` (without the `--` torchrun takes --m for its own). Tables of the same settings share a folder.
    """
    require_matplotlib()
    files = named("var", var or ["demo"])
    judges = named("scorer", scorer or [])
    if preset == ACCURACIES:
        return accuracies(out, judges, real, generated, vae, device)
    demo = list(files.values()) == ["demo"]
    if demo and "" not in judges:
        judges[""] = str(demo_run.WEIGHTS / "scorer.safetensors")
    spanned = {"m": m, "first_scale": first_scale, "pick": pick, "n": n, "scale": scale, "strategy": strategy}
    if preset is None:
        chosen = own_grid(**spanned)
    else:
        refuse(f"{preset} has its own", spanned)
        chosen = find_preset(preset, demo, max_m)
    if all(cell.n == 1 for cell in chosen.cells):
        refuse("only density searches have it", {"alpha": alpha, "min_distance": min_distance})
    if chosen.timing:
        measured = {"images": images, "batch_size": batch_size, "reference": reference, "features": features}
        refuse(f"{preset} takes times alone, of one batch of {TIMED}", measured)
        if find_rank()[0] > 0:  # processes that share a machine slow one another
            print("times are taken by the first process")
            return
    sampled = sampling_of(demo, chosen, preset is not None)
    sampled |= {k: v for k, v in {"cfg": cfg, "top_k": top_k, "top_p": top_p}.items() if v is not None}
    chosen = cut(chosen, alpha, min_distance, max_m)
    where = pick_local_device(device)
    usual = (TIMED, TIMED) if chosen.timing else (2000, 100) if demo else (PUBLISHED_IMAGES, 25)
    count, at_once = (one if one is not None else other for one, other in zip((images, batch_size), usual, strict=True))
    settings = Settings(
        count,
        seeds,
        seed,
        at_once,
        sampled,
        DTYPES.get(autocast),
        0 if chosen.timing else min(neighbors, count),
        chosen.timing,
        {"vae": describe_file(vae), "dtype": dtype, "device": device_name(where)},
    )
    models = later(files, judges, vae, where, DTYPES[dtype])
    if preset is not None:
        chosen = fitting(chosen, models)
    extractor = real_images = None
    if not chosen.timing:
        name = features or ("demo" if demo else "inception")
        extractor = find_extractor(name, where, None)
        facts = {"features": name, "reference": facts_of_reference(reference)}
        facts |= {"features_of": demo_weights()} if name == "demo" else {}
        settings = replace(settings, facts={**settings.facts, **facts})
        real_images = find_reference(reference, demo, seed, extractor, settings)
    folder = out / "timing" if chosen.timing else out
    open_folder(folder)
    share = (0, 1) if chosen.timing else None
    entries = Sweep(folder, chosen.cells, settings, models, extractor, real_images, share).run()
    if entries is None:
        print("other processes have still cells to make; the last one writes the tables")
        return
    times = f"one batch of {TIMED} a seed" if chosen.timing else "the median over batches"
    found = sweep_report.Found(chosen, entries, settings.as_json(), command_line(), times)
    paths = sweep_report.write(found, out)
    print(sweep_report.page(found))
    print(f"wrote {', '.join(map(str, paths))}")


def later(
    files: dict[str, str], judges: dict[str, str], vae: Path | None, device: torch.device, dtype: torch.dtype
) -> Models:
    """Models and scorers by name, to be loaded when they are wanted."""
    return Models(
        {name: partial(load_var, path, vae=vae, device=device, dtype=dtype) for name, path in files.items()},
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


def facts_of_reference(reference: Path | None) -> dict[str, Any] | str:
    if reference is None:
        return "the demo's digits"
    return str(reference.resolve()) if reference.is_dir() else describe_file(reference)


def named(option: str, texts: Sequence[str]) -> dict[str, str]:
    """``NAME=PATH`` by name; what has no name has the name "", or, among several, its own text.

    Raises:
        ValueError: if a name comes twice.
    """
    found: dict[str, str] = {}
    for text in texts:
        match = re.fullmatch(r"([\w.-]+)=(.+)", text)
        name, path = (match[1], match[2]) if match else ("" if len(texts) == 1 else text, text)
        if name in found:
            raise ValueError(f"{option} must have different names, got {name!r} twice")
        found[name] = path
    return found


def find_preset(name: str, demo: bool, max_m: int | None) -> Preset:
    """The preset; of the demo model as the demo has it.

    Raises:
        ValueError: if there is none such.
    """
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, {ACCURACIES}, got {name!r}")
    if not demo:
        return PRESETS[name]
    from varkern.demo.measuring import MOST_CANDIDATES, adapted

    whole = PRESETS[name]
    kept = adapted(whole, MOST_CANDIDATES if max_m is None else max_m)
    if len(kept.rows) < len(whole.rows):
        print(
            f"left out: {len(whole.rows) - len(kept.rows)} cells that the demo lacks scales for, or of too many "
            "candidates (--max-m)",
            file=sys.stderr,
        )
    return kept


def own_grid(
    m: str | None, first_scale: str | None, pick: str | None, n: str | None, scale: str | None, strategy: str | None
) -> Preset:
    """The cells that the options span, the model alone first.

    Raises:
        ValueError: if they span none, or one is wrong.
    """
    if m is None and n is None:
        raise ValueError("m, n or preset must be given: they say what to sweep")
    cells = [Cell()]
    if m is None:
        refuse("it goes with m", {"first_scale": first_scale, "pick": pick})
    else:
        picks = [parse_pick(text) for text in (pick or "best").split(",")]
        cells += grid(m=parse_candidates(m), first_scale=parse_numbers("first_scale", first_scale or "1"), pick=picks)
    if n is None:
        refuse("it goes with n", {"scale": scale, "strategy": strategy})
    else:
        numbers = {"n": parse_numbers("n", n), "scale": parse_numbers("scale", scale or "1")}
        cells += grid(**numbers, strategy=(strategy or "hybrid").split(","))
    return Preset("sweep", "Sweep", "", tuple((cell, {}) for cell in unique(cells)))


def parse_numbers(name: str, text: str) -> list[int]:
    if not re.fullmatch(r"\d{1,9}(,\d{1,9})*", text):
        raise ValueError(f"{name} must be numbers such as 1,2,4, got {text!r}")
    return [int(part) for part in text.split(",")]


def parse_candidates(text: str) -> list[int | tuple[int, ...]]:
    """``1,4,1:4:8`` as ``[1, 4, (1, 4, 8)]``.

    Raises:
        ValueError: if it is no such list.
    """
    if not re.fullmatch(r"\d{1,9}([,:]\d{1,9})*", text):
        raise ValueError(f"m must be numbers such as 1,2,4, or one a scale such as 1:4:8:4:2, got {text!r}")
    parts = [tuple(map(int, part.split(":"))) for part in text.split(",")]
    return [part[0] if len(part) == 1 else part for part in parts]


def sampling_of(demo: bool, preset: Preset, by_name: bool) -> dict[str, Any]:
    if demo:
        from varkern.demo.train import SAMPLING

        return {**SAMPLING, "top_k": 0}
    return {"cfg": preset.cfg if by_name else 1.5, "top_k": preset.top_k, "top_p": preset.top_p}


def cut(preset: Preset, alpha: str | None, min_distance: float | None, max_m: int | None) -> Preset:
    """The preset with a user's alpha and distance, without cells of too many candidates.

    Raises:
        ValueError: if alpha is wrong, or nothing is left.
    """
    if alpha is not None and alpha != MEDIAN:
        try:
            alpha_value: float | str | None = float(alpha)
        except ValueError as error:
            raise ValueError(f"alpha must be a number or {MEDIAN}, got {alpha!r}") from error
    else:
        alpha_value = alpha
    changed = {"alpha": alpha_value, "min_distance": min_distance}
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


def fitting(preset: Preset, models: Models) -> Preset:
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


def find_reference(reference: Path | None, demo: bool, seed: int, extractor: Extractor, settings: Settings) -> Measured:
    """What the real images measure.

    Raises:
        ValueError: if there are none, or they are statistics of other features.
    """
    if reference is None and demo:
        from varkern.demo.measuring import measure_digits

        return measure_digits(extractor, seed, settings.neighbors)
    if reference is None:
        raise ValueError("reference must be given: real images, or their statistics")
    images, stored = open_reference(reference)
    if stored is not None and stored.features not in (None, extractor.name):
        raise ValueError(f"reference holds statistics of features {stored.features!r}, not {extractor.name!r}")
    return measured_reference(images, stored, extractor, settings.batch_size, settings.neighbors)


def accuracies(
    out: Path, judges: dict[str, str], real: Path | None, generated: Path | None, vae: Path | None, device: str
) -> None:
    """LSRS, Table 10, which is ``varkern scorer report`` of two scorers."""
    missing = [name for name, value in (("real", real), ("generated", generated), ("vae", vae)) if value is None]
    if missing or set(judges) != {"with", "without"}:
        raise ValueError(
            f"{ACCURACIES} wants --scorer with=FILE --scorer without=FILE --real DIR --generated DIR --vae FILE: "
            f"scorers trained with the first scale and without; got no {', '.join(missing) or 'such two'}"
        )
    scorer_commands.report(
        scorer=Path(judges["with"]),
        real=real,
        generated=generated,
        vae=vae,
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
