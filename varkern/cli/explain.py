"""``varkern explain`` and ``varkern perturb``: pictures of what a search chooses from, and of what a scale decides."""

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
    number: Annotated[int, typer.Option(help="Number of the image among those of `varkern sample` with this seed")] = 0,
    m: Annotated[str, typer.Option(help="Number of candidates per scale, or one number for each: 1,4,4,...")] = "8",
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
    """Picture one generation: every scale's candidates by score, the kept one framed, and M=1 from the same seed."""
    require_matplotlib()
    require("number", number, 0)
    check_places(out)
    scorer = find_scorer(var, scorer)
    if scorer is None:
        raise ValueError("scorer must be given: without one there is no choice to explain")
    where, candidates = pick_device(device), parse_m(m, scorer)
    model = load_var(var, vae=vae, device=where, dtype=DTYPES[dtype])
    judge = Scorer.from_pretrained(scorer, device=where)
    search = BestOfM(judge, candidates, first_scale, last_scale, parse_pick(pick), temperature)
    options = {"cfg": cfg, "top_k": top_k, "top_p": top_p}
    check_class(label, model)
    with autocasting(model, DTYPES.get(autocast)):
        scales = explaining.explain(model, search, label, varkern.image_seeds(seed, number + 1)[number:], options)
    settings = {"class": label, "seed": seed, "number": number, "m": candidates, "pick": pick, **options}
    place = f"seed {seed}" if number == 0 else f"seed {seed}, image {number}"
    title = f"class {label}, {place}: M={m.replace(',', ', ')}, pick {pick}; what each scale had to choose from"
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
    """Replace each scale of finished images in turn by random tokens, and measure how far the images move."""
    require_matplotlib()
    require("replacements", replacements, 1)
    require("num_per_class", num_per_class, 1)
    check_places(out)
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
    save(out, perturbing.draw(found, "Each scale in turn replaced by random tokens: change of the image"), report)
    for scale in report["scales"]:
        error = scale["standard_error"]
        spread = "" if error is None else f" ± {100 * error:.1f}"
        print(f"scale {scale['scale']} ({scale['side']}x{scale['side']}): {100 * scale['change']:.1f}{spread} %")


def check_places(out: Path) -> None:
    """See that a picture, and a file of figures beside it, can be written.

    Raises:
        ValueError, OSError: if not.
    """
    check_file("out", out, ".png")
    check_file("out", out.with_suffix(".json"), ".json")


def save(out: Path, picture: Figure, figures: dict[str, Any]) -> None:
    """Write a picture, and the figures behind it beside it."""
    write_json(out.with_suffix(".json"), figures)
    save_png(picture, out)
    print(f"wrote {out} and {out.with_suffix('.json')}")


def check_class(label: int, model: torch.nn.Module) -> None:
    if not 0 <= label < model.num_classes:
        raise ValueError(f"class must be in 0..{model.num_classes - 1}, got {label}")
