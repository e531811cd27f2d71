"""``varkern explain`` and ``varkern perturb``: pictures of what a search chooses from, and of what a scale decides."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

import varkern
from varkern.demo import run as demo_run
from varkern.extras import require_pillow
from varkern.models import load_var
from varkern.runs import check_file, write_json
from varkern.scorer import Scorer
from varkern.search import BestOfM
from varkern.studies import explain as explaining
from varkern.studies import perturb as perturbing
from varkern.studies.pictures import save_png
from varkern.studies.sampling import autocasting

from .options import DTYPES, Device, Dtype, Seed, parse_classes, pick_device, require
from .sample import parse_m, parse_pick

if TYPE_CHECKING:
    from PIL import Image

Var = Annotated[str, typer.Option(help="A VAR checkpoint, or d16, d20, d24, d30, d36, demo")]
Vae = Annotated[Path | None, typer.Option(help="The VQ-VAE's checkpoint; not needed for short names")]
Cfg = Annotated[float, typer.Option(help="Strength of guidance at the last scale")]
TopK = Annotated[int, typer.Option(help="Keep the k most probable tokens; 0: all")]
TopP = Annotated[float, typer.Option(help="Then keep the most probable up to this mass; 0: all")]
Weights = Annotated[Dtype, typer.Option(help="Of the weights")]
Autocast = Annotated[Dtype | None, typer.Option(help="Generate under torch.autocast with this dtype")]


def explain(
    label: Annotated[int, typer.Option("--class", help="The image's class")],
    var: Var = "demo",
    vae: Vae = None,
    scorer: Annotated[Path | None, typer.Option(help="The scorer; demo brings its own")] = None,
    seed: Seed = 0,
    number: Annotated[int, typer.Option(help="Which image of `varkern sample` with this seed")] = 0,
    m: Annotated[str, typer.Option(help="Candidates a scale, or one number a scale: 1,4,4,...")] = "8",
    first_scale: Annotated[int, typer.Option(help="The first searched scale, from 0")] = 1,
    last_scale: Annotated[int | None, typer.Option(help="The last searched scale; default: the model's last")] = None,
    pick: Annotated[str, typer.Option(help="best, resample, or k: resample among the k best")] = "best",
    temperature: Annotated[float, typer.Option(help="Of the softmax that resamples")] = 1.0,
    cfg: Cfg = 1.5,
    top_k: TopK = 900,
    top_p: TopP = 0.96,
    device: Device = "auto",
    dtype: Weights = "float32",
    autocast: Autocast = None,
    out: Annotated[Path, typer.Option(help="The picture; the scores go to a .json beside it")] = Path("explain.png"),
) -> None:
    """Picture one generation: every scale's candidates by score, the kept one framed, and M=1 from the same seed."""
    require_pillow()
    require("number", number, 0)
    check_places(out)
    if var == "demo" and scorer is None:
        scorer = demo_run.WEIGHTS / "scorer.safetensors"
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
    classes: Annotated[str, typer.Option("--classes", "--class", help="Such as 207,88 or 0-9; one image each")],
    var: Var = "demo",
    vae: Vae = None,
    seed: Seed = 0,
    replacements: Annotated[int, typer.Option(help="Random token maps a scale and image")] = 16,
    num_per_class: Annotated[int, typer.Option(help="Images a class")] = 1,
    cfg: Cfg = 1.5,
    top_k: TopK = 900,
    top_p: TopP = 0.96,
    device: Device = "auto",
    dtype: Weights = "float32",
    autocast: Autocast = None,
    out: Annotated[Path, typer.Option(help="The picture; the figures go to a .json beside it")] = Path("perturb.png"),
) -> None:
    """Replace each scale of finished images in turn by random tokens, and measure how far the images move."""
    require_pillow()
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


def save(out: Path, picture: Image.Image, figures: dict[str, Any]) -> None:
    """Write a picture, and the figures behind it beside it."""
    write_json(out.with_suffix(".json"), figures)
    save_png(picture, out)
    print(f"wrote {out} and {out.with_suffix('.json')}")


def check_class(label: int, model: torch.nn.Module) -> None:
    if not 0 <= label < model.num_classes:
        raise ValueError(f"class must be in 0..{model.num_classes - 1}, got {label}")
