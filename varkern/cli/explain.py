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

from .options import (
    DTYPES,
    Autocast,
    Cfg,
    Classes,
    Device,
    FirstScale,
    LastScale,
    NumPerClass,
    Pick,
    ScorerFile,
    Seed,
    Temperature,
    TopK,
    TopP,
    Vae,
    Var,
    WeightsDtype,
    find_scorer,
    parse_classes,
    parse_m,
    parse_pick,
    pick_device,
    require,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def explain(
    label: Annotated[int, typer.Option("--class", help="Class of the image")],
    var: Var = "demo",
    vae: Vae = None,
    scorer: ScorerFile = None,
    seed: Seed = 0,
    number: Annotated[int, typer.Option(help="Index of the image among those of `varkern sample` with this seed")] = 0,
    m: Annotated[str, typer.Option(help="Number of candidates, or one number per scale: 1,4,4,...")] = "8",
    first_scale: FirstScale = 1,
    last_scale: LastScale = None,
    pick: Pick = "best",
    temperature: Temperature = 1.0,
    cfg: Cfg = 1.5,
    top_k: TopK = 900,
    top_p: TopP = 0.96,
    device: Device = "auto",
    dtype: WeightsDtype = "float32",
    autocast: Autocast = None,
    out: Annotated[Path, typer.Option(help="Picture to write, with a .json file of the scores")] = Path("explain.png"),
) -> None:
    """Plot one generation: the candidates of every scale by score, with the kept one framed, and the image of M=1."""
    require_matplotlib("plots")
    require("number", number, 0)
    check_outputs(out)
    scorer_file = find_scorer(var, scorer)
    if scorer_file is None:
        raise ValueError("scorer must be given, got none: without a scorer there is no search to explain")
    where, candidates = pick_device(device), parse_m(m, scorer_file)
    model = load_var(var, vae=vae, device=where, dtype=DTYPES[dtype])
    network = Scorer.from_pretrained(scorer_file, device=where)
    search = BestOfM(network, candidates, first_scale, last_scale, parse_pick(pick), temperature)
    options = {"cfg": cfg, "top_k": top_k, "top_p": top_p}
    check_class(label, model)
    with autocasting(model, DTYPES.get(autocast)):
        scales = explaining.explain(model, search, label, varkern.image_seeds(seed, number + 1)[number:], options)
    settings = {"class": label, "seed": seed, "number": number, "m": candidates, "pick": pick, **options}
    place = f"seed {seed}" if number == 0 else f"seed {seed}, image {number}"
    title = f"class {label}, {place}: M={m.replace(',', ', ')}, pick {pick}; candidates of each scale"
    save(out, explaining.draw(scales, title), explaining.as_json(scales, settings))


def perturb(
    classes: Classes,
    var: Var = "demo",
    vae: Vae = None,
    seed: Seed = 0,
    replacements: Annotated[int, typer.Option(help="Number of random token maps per scale and image")] = 16,
    num_per_class: NumPerClass = 1,
    cfg: Cfg = 1.5,
    top_k: TopK = 900,
    top_p: TopP = 0.96,
    device: Device = "auto",
    dtype: WeightsDtype = "float32",
    autocast: Autocast = None,
    out: Annotated[Path, typer.Option(help="Picture to write, with a .json file of the figures")] = Path("perturb.png"),
) -> None:
    """Replace one scale of finished images at a time by random tokens, and measure how much the images change."""
    require_matplotlib("plots")
    require("replacements", replacements, 1)
    require("num_per_class", num_per_class, 1)
    check_outputs(out)
    where = pick_device(device)
    labels = [label for label in parse_classes(classes) for _ in range(num_per_class)]
    model = load_var(var, vae=vae, device=where, dtype=DTYPES[dtype])
    for label in labels:
        check_class(label, model)
    options = {"cfg": cfg, "top_k": top_k, "top_p": top_p}
    seeds = varkern.image_seeds(seed, len(labels))
    with autocasting(model, DTYPES.get(autocast)):
        found = perturbing.perturb(model, torch.tensor(labels), seeds, replacements, seed, options)
    settings = {"classes": labels, "seed": seed, "replacements": replacements, **options}
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
