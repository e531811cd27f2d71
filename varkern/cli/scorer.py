"""``varkern scorer``: training of a scorer on token maps of real and generated images, and its report."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from varkern.data import TokenMaps, file_sha256
from varkern.extras import require_matplotlib
from varkern.hub import locate
from varkern.models import load_vae
from varkern.models.loading import read_state_dict
from varkern.runs import find_rank, open_folder
from varkern.scorer import Scorer, ScorerConfig
from varkern.training import report as scores
from varkern.training.features import FeatureMaker
from varkern.training.recipe import RECIPES, ScorerTraining
from varkern.training.scorer import check_maker, read_facts, train_scorer

from .options import Device, pick_device, require

app = typer.Typer(no_args_is_help=True)

RealMaps = Annotated[Path, typer.Option(help="Token maps of real images, a folder of `varkern tokens encode`")]
GeneratedMaps = Annotated[
    Path, typer.Option(help="Token maps of the model's samples, a folder of `varkern tokens generate`")
]
Vae = Annotated[Path, typer.Option(help="VQ-VAE checkpoint that made both sets of token maps")]
Verify = Annotated[bool, typer.Option(help="Check of all token maps against their checksums before the start")]
Recipe = Annotated[
    Literal["paper", "published"],
    typer.Option(help="Source of the options' defaults: the text of the LSRS paper, or the code published with it"),
]
Features = Annotated[
    Literal["fused", "own"],
    typer.Option(help="Input of the scorer: fused, the sum of all scales; own, a single scale (FlexVAR)"),
]
PairShare = Annotated[
    float | None,
    typer.Option(help="Share of all pairs in an epoch; default: every real image with one partner"),
]
ValidationPairs = Annotated[
    float | None,
    typer.Option(help="Share of all held-out pairs to use; default: every real image with one partner"),
]
BestBy = Annotated[
    Literal["accuracy", "loss"] | None,
    typer.Option(help="Validation figure that selects the epoch whose weights are kept; default: the last epoch"),
]
Widths = Annotated[
    str | None, typer.Option(help="Channels of each stage; default: 64,128,256,..., down to a size of 2x2")
]
Precision = Annotated[
    Literal["auto", "float32", "bfloat16"],
    typer.Option(help="Precision of training; auto: bfloat16 autocast on a GPU, else float32"),
]
Resume = Annotated[bool, typer.Option("--resume/--restart", help="Continuation of a killed run, or a new start")]


@app.command("train")
def train(
    context: typer.Context,
    real: RealMaps,
    generated: GeneratedMaps,
    vae: Vae,
    out: Annotated[Path, typer.Option(help="File for the scorer, a .safetensors file; the CSV gets the same name")],
    recipe: Recipe = "paper",
    loss: Annotated[Literal["pairwise", "pointwise"], typer.Option(help="Loss, eq. 4 or eq. 5 of LSRS")] = "pairwise",
    first_scale: Annotated[int, typer.Option(help="First scale to train on, counted from 0")] = 0,
    features: Features = "fused",
    epochs: Annotated[float, typer.Option(help="Number of epochs")] = 4.0,
    warmup_epochs: Annotated[float, typer.Option(help="Epochs of linear warm-up, included in --epochs")] = 1.0,
    batch_size: Annotated[int, typer.Option(help="Number of pairs per step over all ranks")] = 128,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate of Adam")] = 3e-4,
    weight_decay: Annotated[float, typer.Option(help="Weight decay, decoupled as in AdamW")] = 0.0,
    max_norm: Annotated[float | None, typer.Option(help="Norm to which the gradient is clipped; default: none")] = None,
    validation: Annotated[float, typer.Option(help="Share of every class's images that is held out")] = 0.02,
    seed: Annotated[int, typer.Option(help="Seed of weights, order, pairs and held-out images")] = 0,
    pair_share: PairShare = None,
    validation_pairs: ValidationPairs = None,
    best_by: BestBy = None,
    widths: Widths = None,
    embedding: Annotated[int, typer.Option(help="Width of the class and scale embeddings")] = 128,
    hidden: Annotated[str, typer.Option(help="Widths of the MLP's layers")] = "512,256,128",
    dropout: Annotated[float, typer.Option(help="Probability of dropout after each stage")] = 0.05,
    precision: Precision = "auto",
    device: Device = "auto",
    every: Annotated[int, typer.Option(help="Number of steps between two rows of the CSV")] = 100,
    verify: Verify = True,
    resume: Resume = True,
) -> None:
    """Train a scorer (LSRS, appendix A). A killed run continues where it stopped; torchrun uses several GPUs."""
    require("every", every, 1)
    where = pick_device(device)
    training = make_training(context)
    real_maps, generated_maps = TokenMaps.open(real, verify), TokenMaps.open(generated, verify)
    maker = load_maker(vae, (real_maps, generated_maps), training.features)
    size = maker.patch_nums[-1]
    config = ScorerConfig(
        num_classes=real_maps.manifest.num_classes,
        num_scales=len(maker.patch_nums),
        channels=maker.codebook.shape[1],
        size=size,
        widths=None if widths is None else parse_widths("widths", widths),
        embedding=embedding,
        hidden=parse_widths("hidden", hidden),
        dropout=dropout,
    )
    facts = train_scorer(
        real_maps, generated_maps, maker, config, training, out, device=where, every=every, restart=not resume
    )
    if find_rank()[0] == 0:
        print(summary(facts, out))


@app.command("report")
def report(
    scorer: Annotated[
        str,
        typer.Option(help="Scorer of the report: a file, a folder, or a repository on the hub as user/repo@revision"),
    ],
    real: RealMaps,
    generated: GeneratedMaps,
    vae: Vae,
    out: Annotated[Path, typer.Option(help="Folder for report.json and scores.png")],
    against: Annotated[str | None, typer.Option(help="Second scorer, whose accuracies are compared")] = None,
    features: Annotated[
        Literal["fused", "own"] | None, typer.Option(help="Input of the scorer; default: as in training")
    ] = None,
    first_scale: Annotated[int | None, typer.Option(help="First scale of the report; default: as in training")] = None,
    batch_size: Annotated[int, typer.Option(help="Number of pairs per batch")] = 128,
    save_temperatures: Annotated[
        bool, typer.Option("--save-temperatures", help="Addition of the fitted temperatures to the scorer's file")
    ] = False,
    device: Device = "auto",
    verify: Verify = False,
) -> None:
    """Report accuracy, loss, calibration and the distance of real and generated scores by scale, as a plot and as JSON.

    If the scorer was trained on these token maps, the pairs are those that were held out of the training.
    """
    require("batch_size", batch_size, 1)
    if save_temperatures and not (scorer.endswith(".safetensors") and Path(scorer).is_file()):
        raise ValueError(f"save_temperatures needs a local .safetensors file, got --scorer {scorer}")
    where = pick_device(device)
    require_matplotlib("train")
    real_maps, generated_maps = TokenMaps.open(real, verify), TokenMaps.open(generated, verify)
    open_folder(out)
    reports = []
    for source in filter(None, (scorer, against)):
        path = locate(source)
        network = Scorer.from_pretrained(path, device=where)
        name = Path(source).name if Path(source).exists() else source
        facts = read_facts(path)
        settings = facts.get("settings", {})
        maker = load_maker(vae, (real_maps, generated_maps), features or settings.get("features", "fused"))
        first = settings.get("first_scale", 0) if first_scale is None else first_scale
        reports.append(
            scores.judge(network, name, facts, real_maps, generated_maps, maker.to(where), first, batch_size)
        )
    written = scores.write_report({**reports[0], "against": reports[1:]}, out)
    print(scores.as_markdown(reports))
    print(f"{reports[0]['pairs']} pairs, {reports[0]['pairs_are']}; wrote {written[0]} and {written[1]}")
    if save_temperatures:
        network = Scorer.from_pretrained(scorer)
        fitted = scores.list_temperatures(reports[0], network.config.num_scales)
        network.save_pretrained(scorer, {"temperatures": json.dumps(fitted)})
        print(f"added the fitted temperatures to {scorer}")


def load_maker(vae: Path, datasets: Sequence[TokenMaps], features: str) -> FeatureMaker:
    """Load the codebook, and the phi layers for ``"fused"``, of the checkpoint that made the token maps.

    The scales are those of the datasets if the checkpoint, like a published one, does not contain them.

    Raises:
        FileNotFoundError, ValueError: if it is not a VQ-VAE checkpoint, or did not make the datasets.
    """
    state, config = read_state_dict(vae)
    for maps in datasets:
        made_with = maps.manifest.source.get("vae")
        wanted = made_with.get("sha256") if isinstance(made_with, dict) else None
        if wanted not in (None, file_sha256(vae)):
            raise ValueError(f"vae must be the file that made {maps.folder}, with sha256 {wanted}, got {vae}")
    sides = datasets[0].manifest.patch_nums
    if features == "own":
        if "quantize.embedding.weight" not in state:
            raise ValueError(f"{vae} is not a VQ-VAE checkpoint: it has no quantize.embedding.weight")
        maker = FeatureMaker.of_codebook(state["quantize.embedding.weight"], sides)
    else:
        sides = config.get("v_patch_nums", sides)
        maker = FeatureMaker.of_quantizer(load_vae(vae, v_patch_nums=sides).quantize)
    check_maker(datasets[0], maker)
    return maker


def make_training(context: typer.Context) -> ScorerTraining:
    """Make the settings from the recipe and the options on the command line, which replace those of the recipe."""
    names = {field.name for field in fields(ScorerTraining)} & set(context.params)
    given = {name for name in names if context.get_parameter_source(name).name != "DEFAULT"}
    return replace(RECIPES[context.params["recipe"]], **{name: context.params[name] for name in given})


def parse_widths(name: str, text: str) -> tuple[int, ...]:
    """Parse widths such as ``32,64,64`` of the option ``name``.

    Raises:
        ValueError: if ``text`` is not such a list.
    """
    if not re.fullmatch(r"[1-9]\d{0,5}(,[1-9]\d{0,5})*", text):
        raise ValueError(f"{name} must be numbers such as 64,128,256, got {text!r}")
    return tuple(int(width) for width in text.split(","))


def summary(facts: dict, out: Path) -> str:
    """Summarize a training in a few lines."""
    lines = []
    if "validation" in facts:
        first = facts["settings"]["first_scale"]
        rows = zip(facts["validation"]["loss"], facts["validation"]["accuracy"], strict=True)
        lines += [f"scale {first + k}: loss {loss:.4f}, accuracy {right:.3f}" for k, (loss, right) in enumerate(rows)]
        lines.append(f"on {facts['held_out']} held-out pairs")
    if facts.get("left_out"):
        lines.append(f"{facts['left_out']} real images were left out: no generated image has their class")
    if "examples_per_second" in facts:
        shares = {name: facts.get(f"{name}_share", 0.0) for name in ("data", "fuse", "model")}
        times = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
        lines.append(f"{facts['examples_per_second']:.0f} pairs/s; shares of the time: {times}")
    return "\n".join([*lines, f"wrote {out}"])
