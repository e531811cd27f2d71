"""``varkern explain`` and ``varkern perturb``: plots of the candidates of a search, and of the effect of each scale."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

import varkern
from varkern.extras import require_matplotlib
from varkern.models import load_var
from varkern.runs import check_file, write_json
from varkern.scorer import Scorer
from varkern.search import BestOfM, LogRatio, PathSearch
from varkern.studies import explain as explaining
from varkern.studies import perturb as perturbing
from varkern.studies.explain_paths import draw_paths, explain_paths, paths_as_json
from varkern.studies.pictures import save_png
from varkern.studies.sampling import autocasting

from . import options

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def explain(
    label: Annotated[int, typer.Option("--class", help="Class of the image")],
    var: options.Var = "demo",
    vae: options.Vae = None,
    scorer: options.ScorerFile = None,
    seed: options.Seed = 0,
    number: Annotated[int, typer.Option(help="Index of the image among those of `varkern sample` with this seed")] = 0,
    m: Annotated[
        str | None,
        typer.Option(help="Number of candidates, or one number per scale: 1,4,4,...", show_default="8; 1 with --paths"),
    ] = None,
    paths: Annotated[
        str | None, typer.Option(help="Number of paths after each scale, such as 8,8,4,2,1, for a search over paths")
    ] = None,
    select: Annotated[
        str | None,
        typer.Option(help="Scales and their rules for --paths: 2:cluster,3:resample,4:top; the reward is the score"),
    ] = None,
    first_scale: options.FirstScale = 1,
    last_scale: options.LastScale = None,
    pick: options.Pick = "best",
    temperature: options.Temperature = "1.0",
    cfg: options.Cfg = 1.5,
    top_k: options.TopK = 900,
    top_p: options.TopP = 0.96,
    device: options.Device = "auto",
    dtype: options.WeightsDtype = "float32",
    autocast: options.Autocast = None,
    out: Annotated[Path, typer.Option(help="Picture to write, with a .json file of the scores")] = Path("explain.png"),
) -> None:
    """Plot one generation: the candidates of every scale by score, with the kept one framed, and the image of M=1.

    With --paths, plot the paths of every scale instead, with lines from each path to those that go on from it.
    """
    require_matplotlib("plots")
    options.require("number", number, 0)
    check_outputs(out)
    scorer_file = find_needed_scorer(var, scorer)
    m = m or ("1" if paths else "8")
    where, candidates = options.pick_device(device), options.parse_m(m, scorer_file)
    model = load_var(var, vae=vae, device=where, dtype=options.DTYPES[dtype])
    network = Scorer.from_pretrained(scorer_file, device=where)
    how = options.parse_pick(pick), options.parse_temperature(temperature)
    search = BestOfM(network, candidates, first_scale, last_scale, *how)
    sampling_options = {"cfg": cfg, "top_k": top_k, "top_p": top_p}
    check_class(label, model)
    over_paths = parse_paths(paths, select, LogRatio(network), None if candidates == 1 else search)
    image_seed = varkern.image_seeds(seed, number + 1)[number:]
    settings = {"class": label, "seed": seed, "number": number, "m": candidates, "pick": pick, **sampling_options}
    place = f"seed {seed}" if number == 0 else f"seed {seed}, image {number}"
    with autocasting(model, options.DTYPES.get(autocast)):
        if over_paths is not None:
            followed = explain_paths(model, over_paths, label, image_seed, sampling_options)
            title = f"class {label}, {place}: paths of each scale, and their rewards where a rule asks for them"
            found = draw_paths(followed, title), paths_as_json(followed, {**settings, "paths": paths, "select": select})
        else:
            scales = explaining.explain(model, search, label, image_seed, sampling_options)
            title = f"class {label}, {place}: M={m.replace(',', ', ')}, pick {pick}; candidates of each scale"
            found = explaining.draw(scales, title), explaining.as_json(scales, settings)
    save(out, *found)


def perturb(
    classes: options.Classes,
    var: options.Var = "demo",
    vae: options.Vae = None,
    seed: options.Seed = 0,
    replacements: Annotated[int, typer.Option(help="Number of random token maps per scale and image")] = 16,
    num_per_class: options.NumPerClass = 1,
    cfg: options.Cfg = 1.5,
    top_k: options.TopK = 900,
    top_p: options.TopP = 0.96,
    device: options.Device = "auto",
    dtype: options.WeightsDtype = "float32",
    autocast: options.Autocast = None,
    out: Annotated[Path, typer.Option(help="Picture to write, with a .json file of the figures")] = Path("perturb.png"),
) -> None:
    """Replace one scale of finished images at a time by random tokens, and measure how much the images change."""
    require_matplotlib("plots")
    options.require("replacements", replacements, 1)
    options.require("num_per_class", num_per_class, 1)
    check_outputs(out)
    where = options.pick_device(device)
    labels = [label for label in options.parse_classes(classes) for _ in range(num_per_class)]
    model = load_var(var, vae=vae, device=where, dtype=options.DTYPES[dtype])
    for label in labels:
        check_class(label, model)
    sampling_options = {"cfg": cfg, "top_k": top_k, "top_p": top_p}
    seeds = varkern.image_seeds(seed, len(labels))
    with autocasting(model, options.DTYPES.get(autocast)):
        found = perturbing.perturb(model, torch.tensor(labels), seeds, replacements, seed, sampling_options)
    settings = {"classes": labels, "seed": seed, "replacements": replacements, **sampling_options}
    report = perturbing.as_json(found, settings)
    save(out, perturbing.draw(found, "Change of the image when one scale is replaced by random tokens"), report)
    for scale in report["scales"]:
        error = scale["standard_error"]
        spread = "" if error is None else f" ± {100 * error:.1f}"
        print(f"scale {scale['scale']} ({scale['side']}x{scale['side']}): {100 * scale['change']:.1f}{spread} %")


def find_needed_scorer(var: str, scorer: str | None) -> Path:
    """The scorer's file; see :func:`.options.find_scorer`.

    Raises:
        ValueError: if there is none.
    """
    found = options.find_scorer(var, scorer)
    if found is None:
        raise ValueError("scorer must be given, got none: without a scorer there is no search to explain")
    return found


def parse_paths(paths: str | None, select: str | None, reward: LogRatio, search: BestOfM | None) -> PathSearch | None:
    """The search over paths of the options; None without ``--paths``.

    Raises:
        ValueError: if an option is not of its form.
    """
    if paths is None:
        if select is not None:
            raise ValueError(f"select must be given with paths, got {select!r} alone: give --paths")
        return None
    if not re.fullmatch(r"\d{1,4}(,\d{1,4})*", paths):
        raise ValueError(f"paths must be a number, or one number per scale such as 8,8,4,2,1, got {paths!r}")
    if select is not None and not re.fullmatch(r"\d{1,4}:\w+(,\d{1,4}:\w+)*", select):
        raise ValueError(f"select must be scales and rules such as 2:cluster,4:top, got {select!r}")
    numbers = [int(part) for part in paths.split(",")]
    rules = dict(part.split(":") for part in select.split(",")) if select else {}
    named: Any = {int(scale): rule for scale, rule in rules.items()}
    return PathSearch(numbers[0] if len(numbers) == 1 else numbers, named, reward, search=search)


def check_outputs(out: Path) -> None:
    """Check that a picture and its file of figures can be written.

    Raises:
        ValueError, OSError: if they cannot.
    """
    check_file("out", out, ".png")
    check_file("out", out.with_suffix(".json"), ".json")


def save(out: Path, picture: Figure, figures: dict[str, Any]) -> None:
    """Write a picture and its figures."""
    write_json(out.with_suffix(".json"), figures)
    save_png(picture, out)
    print(f"wrote {out} and {out.with_suffix('.json')}")


def check_class(label: int, model: torch.nn.Module) -> None:
    if not 0 <= label < model.num_classes:
        raise ValueError(f"class must be in 0..{model.num_classes - 1}, got {label}")
