"""``varkern demo``: the digits model that is part of the package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from varkern.demo import run as demo_run
from varkern.runs import claim, open_folder

from .options import Device, Seed, pick_device

app = typer.Typer(invoke_without_command=True)


@app.callback()
def demo(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Picture to write")] = Path("demo.png"),
    seed: Seed = 0,
    m: Annotated[int, typer.Option(help="Number of candidates per scale")] = 8,
    num_per_class: Annotated[int, typer.Option(help="Number of images per digit")] = 4,
    device: Device = "cpu",
) -> None:
    """Generate the ten digits without a search and with three, from the same seeds, and write one picture."""
    if context.invoked_subcommand is not None:
        return
    results = demo_run.run(out, seed, m, num_per_class, pick_device(device))
    Console().print(demo_run.as_table(results, m))
    print(f"wrote {out}")


@app.command("train")
def demo_train(
    out: Annotated[Path, typer.Option(help="Folder for the weights")],
    seed: Annotated[int, typer.Option(help="Seed of the training")] = 0,
    device: Device = "cpu",
) -> None:
    """Train the digits model, its scorer and its classifier. A killed run continues where it stopped."""
    from varkern.demo.digits import originals
    from varkern.demo.train import Recipe, train

    where = pick_device(device)
    originals()  # raises an error now if scikit-learn is missing
    open_folder(out)
    claim(out, {"seed": seed})
    train(out, Recipe(seed=seed), where)
    print(f"wrote the weights to {out}")
