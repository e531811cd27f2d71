"""Why greedy picks get worse again as M grows: an exact toy, and the demo model scale by scale.

    python -m bench.greedy --out DIR

Best-of-M keeps the candidate with the highest score, and the score S estimates ``log(p_real / p_model)``. Drawing from
``p_real`` raises the mean of S over that of the model's own maps by about the variance of S (exactly so if S is normal:
weighting by ``exp(S)`` moves its mean by its variance). The best of M raises it by ``c_M`` standard deviations, where
c_M is the mean of the largest of M standard normal numbers: 1.03 at M=4, 2.34 at M=64. So greedy picks are right where

    c_M = standard deviation of S among the candidates of one scale,

too weak below this M and too strong above it, however exact the scorer is. If this is the reason, then

1. greedy picks get worse again in a toy with the exact ratio, beyond this M; a model that is nearer to the real
   distribution has a smaller standard deviation, so there they get worse again *earlier*;
2. in the demo, each scale has an M of its own by this rule, and searching one scale alone shows which of them does it;
3. greedy picks with the M of the rule at every scale do not have the fault.

The figures of the toy are sums over all of its maps. For the demo, this trains a scorer and measures the shipped VAR.
``--steps`` gives other lengths of the VAR's training, each of which gets a VAR and a scorer of its own. It can be
killed at any time and continues where it stopped. It writes ``greedy.json`` and ``greedy.md``.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from bench.commands import command, describe_command
from varkern import BestOfM, Scorer, generate, load_vae, load_var
from varkern.cli.options import pick_local_device, require
from varkern.data import file_sha256
from varkern.demo.digits import NUM_CLASSES
from varkern.demo.measuring import extractor, fingerprint, measure_digits
from varkern.demo.run import WEIGHTS
from varkern.demo.train import (
    PATCH_NUMS,
    SAMPLING,
    SCORER_SIZES,
    Recipe,
    train_var,
    write_generated_tokens,
    write_real_tokens,
)
from varkern.ops import image_seeds
from varkern.runs import claim, open_folder, write_json, write_text
from varkern.studies.cells import Cell, unique
from varkern.studies.models import Models
from varkern.studies.sweep import Settings, Sweep
from varkern.tables import markdown_table
from varkern.training.features import FeatureMaker
from varkern.training.scorer import train_scorer

EVALUATED_SEED = 7_000_000  # no training and no other table uses these seeds
EPOCHS = 1.6  # of each scorer: a quarter of the recipe, as in bench.demo_tables
UNIFORM = (2, 4, 8, 16, 32, 64)
ONE_SCALE = (2, 4, 8, 16, 64)
MOST = 256  # candidates of the rule
SPREAD_CANDIDATES, SPREAD_IMAGES = 64, 500
LENGTH, VALUES = 3, 4  # of a map of the toy: tokens, and values of a token
NEARNESS = (0.0, 0.25, 0.5, 0.75, 0.9)
TOY_CANDIDATES = (1, 2, 3, 4, 5, 8, 16, 64)


def largest_normal(m: int) -> float:
    """The mean of the largest of ``m`` independent standard normal numbers, by integration to about 1e-6."""
    x = torch.linspace(-9, 9, 20_001, dtype=torch.float64)
    below = torch.special.ndtr(x).pow(m)
    return float(((x[1:] + x[:-1]) / 2 * below.diff()).sum())


def rule(deviation: float) -> int:
    """The M whose :func:`largest_normal` is nearest to the standard deviation of the scores."""
    return min(range(1, MOST + 1), key=lambda m: abs(largest_normal(m) - deviation))


def toy_real(seed: int = 0) -> Tensor:
    """The distribution of real maps of the toy, ``[VALUES ** LENGTH]`` float64: its tokens depend on each other."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(VALUES**LENGTH, generator=generator, dtype=torch.float64).softmax(0)


def toy_model(real: Tensor, nearness: float) -> Tensor:
    """A model of the toy: the product of the real marginals at nearness 0, the real distribution at 1."""
    table = real.view((VALUES,) * LENGTH)
    marginals = [table.sum([axis for axis in range(LENGTH) if axis != kept]) for kept in range(LENGTH)]
    product = marginals[0]
    for marginal in marginals[1:]:
        product = product[..., None] * marginal
    return (nearness * real.log() + (1 - nearness) * product.flatten().log()).softmax(0)


def picked(model: Tensor, ratio: Tensor, m: int) -> Tensor:
    """The exact distribution of the greedy pick among ``m`` draws of ``model`` by the highest ``ratio``, without ties.

    A map is picked if all draws have its ratio or less, and not all have less: ``F(r) ** m - F(r-) ** m``.
    """
    order = ratio.argsort()
    below = torch.cat((model.new_zeros(1), model[order].cumsum(0)))
    return torch.empty_like(model).index_copy_(0, order, below.pow(m).diff())


def toy() -> list[dict[str, Any]]:
    """By the model's nearness: total variation distance of greedy picks to the real distribution, by M; the best M."""
    real, rows = toy_real(), []
    for nearness in NEARNESS:
        model = toy_model(real, nearness)
        score = (real / model).log()
        deviation = float((model * (score - (model * score).sum()).square()).sum().sqrt())
        found = {m: float((picked(model, score, m) - real).abs().sum() / 2) for m in range(1, TOY_CANDIDATES[-1] + 1)}
        rows.append(
            {
                "nearness": nearness,
                "deviation": deviation,
                "rule": rule(deviation),
                "best": min(found, key=found.__getitem__),
                "distance": [found[m] for m in TOY_CANDIDATES],
            }
        )
    return rows


def prepare(folder: Path, recipe: Recipe, device: torch.device) -> None:
    """Make the weights of one training length in ``folder``: VQ-VAE, VAR and scorer."""
    for name in ("vae", "classifier"):
        shutil.copy(WEIGHTS / f"{name}.safetensors", folder)
    if recipe.var_steps == Recipe().var_steps:
        shutil.copy(WEIGHTS / "var.safetensors", folder)
    elif not (folder / "var.safetensors").exists():
        torch.manual_seed(recipe.seed)
        train_var(recipe, folder, device)
    path = folder / "scorer.safetensors"
    if not path.exists():
        real = write_real_tokens(recipe, folder, device, folder / "tokens" / "real")
        generated = write_generated_tokens(recipe, folder, device, folder / "tokens" / "generated")
        maker = FeatureMaker.of_quantizer(load_vae(folder / "vae.safetensors").quantize)
        train_scorer(real, generated, maker, SCORER_SIZES, recipe.scorer_training(), path, device=device)


def deviations(folder: Path, device: torch.device) -> list[float]:
    """The standard deviation of the scores among the candidates of an image, for every scale; its mean over images.

    The earlier scales are resampled, so that the candidates continue maps that are close to real ones.
    """
    model = load_var(folder / "var.safetensors", vae=folder / "vae.safetensors", device=device)
    scorer = Scorer.from_pretrained(folder / "scorer.safetensors", device=device)
    search = BestOfM(scorer, SPREAD_CANDIDATES, first_scale=0, pick="resample")
    labels, seeds = torch.arange(SPREAD_IMAGES) % NUM_CLASSES, image_seeds(EVALUATED_SEED - 1, SPREAD_IMAGES)
    parts = [
        generate(model, labels[part], search=search, seeds=seeds[part], decode=False, **SAMPLING).scores
        for part in torch.arange(SPREAD_IMAGES).split(100)
    ]
    return [float(torch.cat(scores).double().std(1).mean()) for scores in zip(*parts, strict=True)]


def searches(by_rule: Sequence[int]) -> dict[str, list[Cell]]:
    """The measured cells by the name of their row; every row begins with the model alone."""
    scales = range(1, len(PATCH_NUMS))
    rows = {"every scale from the second on": [Cell(m=m) for m in UNIFORM]}
    for scale in scales:
        rows[f"scale {scale} alone"] = [Cell(m=m, first_scale=scale, last_scale=scale) for m in ONE_SCALE]
    rows["by the rule"] = [Cell(m=(1, *by_rule[1:]))]
    rows["resampled"] = [Cell(m=64, pick="resample")]
    return {name: [Cell(), *cells] for name, cells in rows.items()}


def measure(
    folder: Path, rows: Mapping[str, list[Cell]], images: int, repeats: int, device: torch.device
) -> dict[str, list[dict[str, Any]]]:
    """The Fréchet distance of every cell, ``{"m": ..., "fid": one for each repeat}``."""
    models = Models(
        {"": partial(load_var, folder / "var.safetensors", vae=folder / "vae.safetensors", device=device)},
        {"": partial(Scorer.from_pretrained, folder / "scorer.safetensors", device=device)},
        {"": file_sha256(folder / "scorer.safetensors")[:16]},
    )
    features, facts = extractor(WEIGHTS, device), {"weights": fingerprint(folder), "device": device.type}
    settings = Settings(images, repeats, EVALUATED_SEED, 100, {**SAMPLING, "top_k": 0}, None, 0, facts=facts)
    cells = unique(cell for row in rows.values() for cell in row)
    reference = measure_digits(features, EVALUATED_SEED, 0)
    entries = Sweep(folder / "figures", cells, settings, models, features, reference, (0, 1)).run()
    assert entries is not None, "this process makes all cells"
    found = {entry.cell: [repeat["fid"] for repeat in entry.repeats] for entry in entries}
    return {name: [{"m": cell.m, "fid": found[cell]} for cell in row] for name, row in rows.items()}


def run(out: Path, steps: int, images: int, repeats: int, recipe: Recipe, device: torch.device) -> dict[str, Any]:
    """Train and measure one training length; returns its figures."""
    folder = out / f"steps-{steps}"
    open_folder(folder)
    hashes = {name: file_sha256(WEIGHTS / f"{name}.safetensors") for name in ("vae", "var", "classifier")}
    claim(folder, {**asdict(recipe), "images": images, "repeats": repeats, "device": device.type, **hashes})
    prepare(folder, recipe, device)
    found = deviations(folder, device)
    by_rule = [rule(deviation) for deviation in found]
    return {
        "steps": steps,
        "deviations": found,
        "rule": by_rule,
        "rows": measure(folder, searches(by_rule), images, repeats, device),
    }


def markdown(report: Mapping[str, Any]) -> str:
    """A table of the toy; for each model, one of the scores' spread and one of the Fréchet distances."""
    seeds = f"{report['seeds']} seeds from {report['seed']}"
    parts = [f"`{report['command']}`: {report['images']:,} images per cell and seed, {seeds}."]
    parts += ["The toy: total variation distance between greedy picks by the exact ratio and the real distribution."]
    head = ["nearness of the model", "standard deviation of log-ratio", "M by the rule", "best M"]
    rows = [
        [
            f"{row['nearness']:g}",
            f"{row['deviation']:.2f}",
            row["rule"],
            row["best"],
            *map("{:.3f}".format, row["distance"]),
        ]
        for row in report["toy"]
    ]
    parts.append(markdown_table([*head, *(f"M={m}" for m in TOY_CANDIDATES)], rows))
    for model in report["models"]:
        parts.append(f"The demo, VAR trained for {model['steps']:,} steps:")
        rows = [[k, f"{d:.2f}", m] for k, (d, m) in enumerate(zip(model["deviations"], model["rule"], strict=True))]
        parts.append(markdown_table(["scale", "standard deviation of the scores", "M by the rule"], rows))
        counts = sorted({cell["m"] for row in model["rows"].values() for cell in row if isinstance(cell["m"], int)})
        rows = []
        for name, cells in model["rows"].items():
            values = {cell["m"]: show(cell["fid"]) for cell in cells if isinstance(cell["m"], int)}
            if name == "by the rule":
                name, values = f"greedy, M by the rule: {show(cells[-1]['fid'])}", {}
            rows.append([name, *(values.get(m, "") for m in counts)])
        parts.append(markdown_table(["Fréchet distance", *(f"M={m}" for m in counts)], rows))
    return "\n".join(part if part.endswith("\n") else part + "\n" for part in parts)


def show(values: Sequence[float], digits: int = 1) -> str:
    """Mean ± half the range; no range of a single value."""
    spread = f" ± {(max(values) - min(values)) / 2:.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{spread}"


@command("greedy")
def main(arguments: list[str] | None = None) -> str:
    parser = argparse.ArgumentParser("bench.greedy", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for weights, figures and tables")
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[Recipe().var_steps], help="lengths of the VAR's training"
    )
    parser.add_argument("--images", type=int, default=2000, help="images per cell and seed (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=2, help="repeats of every cell (default: %(default)s)")
    parser.add_argument("--maps", type=int, default=Recipe().generated_maps, help="generated maps of each training")
    parser.add_argument("--device", default="cpu", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    options = parser.parse_args(arguments)
    recipe = replace(Recipe(scorer_epochs=EPOCHS), generated_maps=options.maps, real_maps=2 * options.maps)
    for name, least in (("images", 100), ("seeds", 1), ("maps", 100)):
        require(name, getattr(options, name), least)
    for steps in options.steps:
        require("steps", steps, 1)
    device = pick_local_device(options.device)
    models = [
        run(options.out, n, options.images, options.seeds, replace(recipe, var_steps=n), device) for n in options.steps
    ]
    words = describe_command(parser, options, ("steps", "images", "seeds", "maps", "device"))
    facts = {"seed": EVALUATED_SEED, "seeds": options.seeds, "images": options.images}
    report = {"command": words, **facts, "toy": toy(), "models": models}
    write_json(options.out / "greedy.json", report)
    write_text(options.out / "greedy.md", markdown(report))
    return markdown(report)


if __name__ == "__main__":
    sys.exit(main())
