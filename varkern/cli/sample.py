"""``varkern sample``: images of a model, with or without a search, to a folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer

import varkern
from varkern.demo import run as demo_run
from varkern.extras import require_pillow
from varkern.models import load_var
from varkern.runs import check_file, claim, describe_file, open_folder
from varkern.scorer import Scorer
from varkern.search import BestOfM
from varkern.studies import sampling

from .evaluate import warn
from .options import DTYPES, Device, Dtype, Seed, parse_classes, pick_device, require


def sample(
    var: Annotated[str, typer.Option(help="A VAR checkpoint, or d16, d20, d24, d30, d36, demo")],
    classes: Annotated[str, typer.Option(help="Such as 207,88 or 0-9")],
    out: Annotated[Path, typer.Option(help="Folder for the images")],
    vae: Annotated[Path | None, typer.Option(help="The VQ-VAE's checkpoint; not needed for short names")] = None,
    scorer: Annotated[Path | None, typer.Option(help="The scorer; demo brings its own")] = None,
    m: Annotated[str | None, typer.Option(help="Candidates a scale, or one number each: 1,4,4,...; default: 4")] = None,
    first_scale: Annotated[int, typer.Option(help="The first searched scale, from 0")] = 1,
    last_scale: Annotated[int | None, typer.Option(help="The last searched scale; default: the model's last")] = None,
    pick: Annotated[str, typer.Option(help="best, resample, or k: resample among the k best")] = "best",
    temperature: Annotated[float, typer.Option(help="Of the softmax that resamples")] = 1.0,
    seed: Seed = 0,
    cfg: Annotated[float, typer.Option(help="Strength of guidance at the last scale")] = 1.5,
    top_k: Annotated[int, typer.Option(help="Keep the k most probable tokens; 0: all")] = 900,
    top_p: Annotated[float, typer.Option(help="Then keep the most probable up to this mass; 0: all")] = 0.96,
    num_per_class: Annotated[int, typer.Option(help="Images a class")] = 1,
    batch_size: Annotated[int, typer.Option(help="Images at a time")] = 8,
    device: Device = "auto",
    dtype: Annotated[Dtype, typer.Option(help="Of the weights")] = "float32",
    autocast: Annotated[Dtype | None, typer.Option(help="Generate under torch.autocast with this dtype")] = None,
    sampler: Annotated[
        Literal["philox", "multinomial"], typer.Option(help="Random numbers: by image, or the model's own generator")
    ] = "philox",
    npz: Annotated[
        Path | None, typer.Option(help="Write the images to this .npz too, for the published evaluation suite")
    ] = None,
) -> None:
    """Sample images to a folder: PNG files and a contact sheet. A killed run goes on where it stopped."""
    require("num_per_class", num_per_class, 1)
    where, wanted = pick_device(device), parse_classes(classes)
    labels = [label for label in wanted for _ in range(num_per_class)]
    options = {"cfg": cfg, "top_k": top_k, "top_p": top_p}
    order = sampling.Order(labels, seed, sampler, options, DTYPES.get(autocast))
    if var == "demo" and scorer is None:
        scorer = demo_run.WEIGHTS / "scorer.safetensors"
    candidates = parse_m(m, scorer)
    search_settings = {
        "m": candidates,
        "first_scale": first_scale,
        "last_scale": last_scale,
        "pick": parse_pick(pick),
        "temperature": temperature,
    }
    require_pillow()
    check_file("npz", npz, ".npz")
    open_folder(out)
    model = load_var(var, vae=vae, device=where, dtype=DTYPES[dtype])
    # Built for one candidate too, so that a wrong pick or scale is told even there.
    search = BestOfM(Scorer.from_pretrained(scorer, device=where) if scorer else no_scorer, **search_settings)
    sampling.check_order(model, search, order, batch_size)
    settings = {
        "varkern": varkern.__version__,
        "var": describe_file(var),
        "vae": describe_file(vae),
        "scorer": describe_file(scorer),
        "classes": wanted,
        "num_per_class": num_per_class,
        "seed": seed,
        **search_settings,
        **options,
        "dtype": dtype,
        "autocast": autocast,
        "sampler": sampler,
    }
    if sampler == "multinomial":  # there an image depends on its whole batch
        settings["batch_size"] = batch_size
    claim(out, settings)
    paths = sampling.fill(out, model, search, order, batch_size)
    sheet = sampling.write_sheet(out, paths, order, num_per_class)
    print(f"{len(paths)} images in {out}, contact sheet {sheet}")
    if npz is not None:
        warn(sampling.pack(paths, npz))
        print(f"wrote {npz}")


def parse_m(text: str | None, scorer: Path | None) -> int | list[int]:
    """Candidates a scale, or one number a scale; not given: 4 with a scorer, 1 without.

    Raises:
        ValueError: if ``text`` is no such number, or asks for a search without a scorer.
    """
    if text is None:
        return 1 if scorer is None else 4
    if not re.fullmatch(r"-?\d{1,9}(,\d{1,9})*", text):
        raise ValueError(f"m must be a number, or one number a scale such as 1,4,4,8, got {text!r}")
    numbers = [int(part) for part in text.split(",")]
    if scorer is None and max(numbers) > 1:
        raise ValueError(f"m must be 1 without a scorer, got {text}: give --scorer")
    return numbers[0] if len(numbers) == 1 else numbers


def parse_pick(text: str) -> str | int:
    return int(text) if re.fullmatch(r"-?\d{1,9}", text) else text


def no_scorer(*_: object) -> torch.Tensor:
    raise AssertionError("with one candidate a scale nothing is scored")
