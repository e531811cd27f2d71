"""``varkern explain`` and ``varkern perturb``: plots of the candidates of a search, and of the effect of each scale."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

import varkern
from varkern.extras import require_matplotlib
from varkern.models import load_var
from varkern.runs import check_file, write_json
from varkern.scorer import Scorer
from varkern.search import BestOfM
from varkern.studies import explain as explaining
from varkern.studies import perturb as perturbing
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
    m: Annotated[str, typer.Option(help="Number of candidates, or one number per scale: 1,4,4,...")] = "8",
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
    """Plot one generation: the candidates of every scale by score, with the kept one framed, and the image of M=1."""
    require_matplotlib("plots")
    options.require("number", number, 0)
    check_outputs(out)
    scorer_file = options.find_scorer(var, scorer)
    if scorer_file is None:
        raise ValueError("scorer must be given, got none: without a scorer there is no search to explain")
    where, candidates = options.pick_device(device), options.parse_m(m, scorer_file)
    model = load_var(var, vae=vae, device=where, dtype=options.DTYPES[dtype])
    network = Scorer.from_pretrained(scorer_file, device=where)
    how = options.parse_pick(pick), options.parse_temperature(temperature)
    search = BestOfM(network, candidates, first_scale, last_scale, *how)
    sampling_options = {"cfg": cfg, "top_k": top_k, "top_p": top_p}
    check_class(label, model)
    with autocasting(model, options.DTYPES.get(autocast)):
        scales = explaining.explain(
            model, search, label, varkern.image_seeds(seed, number + 1)[number:], sampling_options
        )
    settings = {"class": label, "seed": seed, "number": number, "m": candidates, "pick": pick, **sampling_options}
    place = f"seed {seed}" if number == 0 else f"seed {seed}, image {number}"
    title = f"class {label}, {place}: M={m.replace(',', ', ')}, pick {pick}; candidates of each scale"
    save(out, explaining.draw(scales, title), explaining.as_json(scales, settings))


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
