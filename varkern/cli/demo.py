"""``varkern demo``: the digits model that ships with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from varkern.demo import run as demo_run
from varkern.evaluation import sampling

from .options import Device, Seed, pick_device, require

app = typer.Typer(invoke_without_command=True)


@app.callback()
def demo(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="The picture")] = Path("demo.png"),
    seed: Seed = 0,
    m: Annotated[int, typer.Option(help="Candidates a scale")] = 8,
    num_per_class: Annotated[int, typer.Option(help="Images a digit")] = 4,
    device: Device = "cpu",
) -> None:
    """Generate the ten digits with and without best-of-M, from the same seeds, and write one picture."""
    if context.invoked_subcommand is not None:
        return
    results = demo_run.run(out, seed, m, num_per_class, pick_device(device))
    Console().print(demo_run.as_table(results, m))
    print(f"wrote {out}")


@app.command("train")
def demo_train(
    out: Annotated[Path, typer.Option(help="Folder for the weights")],
    seed: Annotated[int, typer.Option(help="Of the whole training")] = 0,
    device: Device = "cpu",
) -> None:
    """Train the digits model, its scorer and its classifier from nothing; goes on where a killed run stopped."""
    from varkern.demo.digits import originals
    from varkern.demo.train import Recipe, train

    where = pick_device(device)
    originals()  # says what to install if scikit-learn is missing
    sampling.open_folder(out)
    sampling.claim(out, {"seed": seed})
    train(out, Recipe(seed=seed), where)
    print(f"wrote the weights to {out}")


@app.command("table")
def demo_table(
    out: Annotated[Path, typer.Option(help="Folder for the figures")],
    images: Annotated[int, typer.Option(help="Images a cell")] = 5000,
    seeds: Annotated[int, typer.Option(help="Repeats a cell")] = 3,
    weights: Annotated[Path | None, typer.Option(help="Folder of `demo train`  [the shipped weights]")] = None,
    device: Device = "cpu",
) -> None:
    """Measure what searches do to the digits model, in Fréchet distance, score and accuracy."""
    from varkern.demo import table

    require("images", images, 2)
    require("seeds", seeds, 1)
    where = pick_device(device)
    sampling.open_folder(out)
    print(table.run(out, images, seeds, str(where), weights or table.WEIGHTS))
