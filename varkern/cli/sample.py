"""``varkern sample``: images of a model, with or without a search, to a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer

import varkern
from varkern.extras import require_matplotlib
from varkern.models import load_var
from varkern.runs import check_file, claim, describe_file, open_folder
from varkern.studies import sampling

from . import options
from .evaluate import warn

Candidates = Annotated[
    str | None,
    typer.Option(help="Number of candidates, or one number per scale: 1,4,4,...; default: 4, or 1 without scorer"),
]
Sampler = Annotated[
    Literal["philox", "multinomial"],
    typer.Option(help="Random numbers: philox, from each image's seed; multinomial, from the model's own generator"),
]
Npz = Annotated[Path | None, typer.Option(help="File for all images, an .npz file for the published evaluation code")]


def sample(
    var: options.Var,
    classes: options.Classes,
    out: Annotated[Path, typer.Option(help="Folder for the images")],
    vae: options.Vae = None,
    scorer: options.ScorerFiles = None,
    m: Candidates = None,
    proposals: options.Proposals = 0,
    sweeps: options.Sweeps = 1,
    first_scale: options.FirstScale = 1,
    last_scale: options.LastScale = None,
    pick: options.PickOrDefault = None,
    temperature: options.Temperature = "1.0",
    seed: options.Seed = 0,
    cfg: options.Cfg = 1.5,
    top_k: options.TopK = 900,
    top_p: options.TopP = 0.96,
    num_per_class: options.NumPerClass = 1,
    batch_size: options.BatchSize = 8,
    device: options.Device = "auto",
    dtype: options.WeightsDtype = "float32",
    autocast: options.Autocast = None,
    sampler: Sampler = "philox",
    npz: Npz = None,
) -> None:
    """Sample images to a folder: PNG files and a contact sheet. A killed run continues where it stopped."""
    options.require("num_per_class", num_per_class, 1)
    where, wanted = options.pick_device(device), options.parse_classes(classes)
    sampling_options = {"cfg": cfg, "top_k": top_k, "top_p": top_p}
    labels = [label for label in wanted for _ in range(num_per_class)]
    order = sampling.Order(labels, seed, sampler, sampling_options, options.DTYPES.get(autocast))
    scorer_files = options.find_scorers(var, scorer)
    search_settings = {
        "m": options.parse_m(m, scorer_files),
        "first_scale": first_scale,
        "last_scale": last_scale,
        "pick": options.parse_pick(pick or ("resample" if proposals else "best")),
        "temperature": options.parse_temperature(temperature),
    }
    if proposals and not scorer_files:
        raise ValueError(f"proposals must be 0 without a scorer, got {proposals}: give --scorer")
    require_matplotlib("plots")
    check_file("npz", npz, ".npz")
    network = options.load_scorers(scorer_files, where) or no_scorer
    open_folder(out)
    model = load_var(var, vae=vae, device=where, dtype=options.DTYPES[dtype])
    # With one candidate too, a search is made, because it checks the pick and the scales.
    search = options.build_search(network, search_settings, proposals, sweeps)
    sampling.check_order(model, search, order, batch_size)
    settings = {
        "varkern": varkern.__version__,
        "var": describe_file(var),
        "vae": describe_file(vae),
        "scorer": options.describe_scorers(scorer, scorer_files),
        "classes": wanted,
        "num_per_class": num_per_class,
        "seed": seed,
        **search_settings,
        **({"proposals": proposals, "sweeps": sweeps} if proposals else {}),
        **sampling_options,
        "dtype": dtype,
        "autocast": autocast,
        "sampler": sampler,
        **({"batch_size": batch_size} if sampler == "multinomial" else {}),  # with it an image depends on its batch
    }
    claim(out, settings)
    paths = sampling.fill(out, model, search, order, batch_size)
    print(f"{len(paths)} images in {out}, contact sheet {sampling.write_sheet(out, paths, order, num_per_class)}")
    write_npz(paths, npz)


def write_npz(paths: Sequence[Path], npz: Path | None) -> None:
    """Write finished images to the file ``npz``, if given, and warn if they are not fit for an evaluation."""
    if npz is not None:
        warn(sampling.pack(paths, npz))
        print(f"wrote {npz}")


def no_scorer(*_: object) -> torch.Tensor:
    raise AssertionError("a single candidate must not be scored")
