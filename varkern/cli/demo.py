"""``varkern demo``: the digits model that ships with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from varkern.demo import run as demo_run
from varkern.extras import require_matplotlib
from varkern.runs import claim, open_folder, write_text

from .options import Device, Seed, pick_device, pick_local_device, require

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
    """Generate the ten digits with and without best-of-M, from the same seeds, and write one picture."""
    if context.invoked_subcommand is not None:
        return
    results = demo_run.run(out, seed, m, num_per_class, pick_device(device))
    Console().print(demo_run.as_table(results, m))
    print(f"wrote {out}")


@app.command("train")
def demo_train(
    out: Annotated[Path, typer.Option(help="Folder for the weights")],
    seed: Annotated[int, typer.Option(help="Seed of the whole training")] = 0,
    device: Device = "cpu",
) -> None:
    """Train the digits model, its scorer and its classifier from nothing; goes on where a killed run stopped."""
    from varkern.demo.digits import originals
    from varkern.demo.train import Recipe, train

    where = pick_device(device)
    originals()  # says what to install if scikit-learn is missing
    open_folder(out)
    claim(out, {"seed": seed})
    train(out, Recipe(seed=seed), where)
    print(f"wrote the weights to {out}")


@app.command("table")
def demo_table(
    out: Annotated[Path, typer.Option(help="Folder for the figures")],
    images: Annotated[int, typer.Option(help="Images a cell and seed")] = 2000,
    seeds: Annotated[int, typer.Option(help="Repeats a cell")] = 3,
    weights: Annotated[Path | None, typer.Option(help="Folder of `demo train`; default: the shipped weights")] = None,
    page: Annotated[Path | None, typer.Option(help="A copy of the demo's README.md to put the tables into")] = None,
    device: Device = "cpu",
) -> None:
    """Measure what searches do to the digits model: the papers' tables, and more.

    Trains the scorers that they compare, if `demo scorers --out DIR/scorers` has not yet. A killed run goes on where it
    stopped; under torchrun the processes share the cells, once the scorers are there.
    """
    from bench.demo_tables import page as pages
    from bench.demo_tables.tables import Demo

    require("images", images, 2)
    require("seeds", seeds, 1)
    where = pick_local_device(device)
    require_matplotlib()
    if page is not None:
        pages.check(page.read_text())
    open_folder(out)
    paths = Demo(out, images, seeds, where, weights or demo_run.WEIGHTS).run()
    if paths is None:
        print("other processes have still cells to make; the last one writes the tables")
        return
    if page is not None:
        text = pages.fill(page.read_text(), pages.read_tables(out))
        write_text(page, text)
    print(f"wrote {len(paths)} files of figures to {out}" + ("" if page is None else f", and the tables to {page}"))


@app.command("scorers")
def demo_scorers(
    out: Annotated[Path, typer.Option(help="Folder for the scorers, their token maps and the figures")],
    device: Device = "cpu",
) -> None:
    """Compare ways to train the digits model's scorer: both losses, and with the first scale or without.

    Goes on where a killed run stopped.
    """
    from bench.demo_tables import scorers
    from varkern.demo.digits import originals

    where = pick_device(device)
    originals()  # says what to install if scikit-learn is missing
    print(scorers.run(out, where))
    print(f"wrote the scorers, scorers.json and scorers.md to {out}")
