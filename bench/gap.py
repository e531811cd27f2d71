"""How much of the gap between the demo model and its tokenizer searches close, with many images.

    python -m bench.gap --out DIR

The gap is the distance of the model's own images minus that of real digits which the VQ-VAE encoded and decoded. No
generated digit can be much better than these. A search that lowers the distance by half of the gap closes 50% of it.
The same seeds are used for every search and for the model alone, so a percentage is computed within a seed.

It can be killed at any time and continues where it stopped. Under ``torchrun`` several processes share the work; call
it once more without ``torchrun`` to write ``gap.json`` and ``gap.md``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from bench.boosting import LEAST_IMAGES
from bench.commands import command, describe_command
from bench.demo_tables.tables import REPORTED_SEED, make_models, make_settings, references, shipped_scorers
from bench.greedy import show
from varkern.cli.options import pick_local_device, require
from varkern.demo.measuring import extractor, measure_digits
from varkern.demo.run import WEIGHTS
from varkern.runs import find_rank, write_json, write_text
from varkern.studies.cells import Cell
from varkern.studies.sweep import Entry, Sweep
from varkern.tables import markdown_table

SEARCHES = {
    "64 whole maps": Cell(m=64, pick="resample"),
    "blocks, 50 maps": Cell(m=8, proposals=8, pick="resample"),
    "256 whole maps": Cell(m=256, pick="resample"),
    "blocks, 232 maps": Cell(m=64, proposals=32, pick="resample"),
}
SCORERS = {"": "the first scorer", "sum": "the sum of both"}
# The first scorer alone has no rows of about 256 maps: they change little (preset "blocks" of bench.demo_tables).
ROWS = [*(("", title) for title in list(SEARCHES)[:2]), *(("sum", title) for title in SEARCHES)]
FIGURES = {"fid": ("Fréchet distance", 2), "precision": ("precision", 3), "recall": ("recall", 3)}


def run(out: Path, images: int, repeats: int, device: torch.device) -> dict[str, Any] | None:
    """Measure all searches; returns every figure of every seed, or None under ``torchrun``.

    Raises:
        ValueError: if ``out`` has figures of other settings.
    """
    models = make_models(WEIGHTS, shipped_scorers(WEIGHTS), device)
    settings, features = make_settings(images, repeats, WEIGHTS, device), extractor(WEIGHTS, device)
    cells = [Cell(), *(replace(SEARCHES[title], scorer=name) for name, title in ROWS)]
    reference = measure_digits(features, REPORTED_SEED, images)
    entries = Sweep(out, cells, settings, models, features, reference).run()
    if entries is None or find_rank()[1] > 1:
        return None
    floor = references(models.model("").vae_proxy[0], settings, features, reference)["reconstructed"]
    return {"images": images, "seed": REPORTED_SEED, "seeds": repeats, **collect(entries, floor)}


def collect(entries: Sequence[Entry], floor: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """The figures of the model alone, of the floor and of each search, one of each seed, with the percentages closed.

    Args:
        entries: those of the model alone and of :data:`ROWS`, in this order.
        floor: figures of reconstructed real digits, one of each seed.
    """
    alone, least = list_figures(entries[0].repeats), fmean(figures["fid"] for figures in floor)
    rows = []
    for (scorer, title), entry in zip(ROWS, entries[1:], strict=True):
        found = list_figures(entry.repeats)
        closed = [100 * (a - b) / (a - least) for a, b in zip(alone["fid"], found["fid"], strict=True)]
        rows.append({"scorer": scorer, "search": title, **found, "closed": closed})
    return {"alone": alone, "floor": list_figures(floor), "rows": rows}


def list_figures(repeats: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    return {name: [repeat[name] for repeat in repeats] for name in FIGURES}


def markdown(report: Mapping[str, Any]) -> str:
    """One table: the model alone, the floor, and every search with every scorer."""
    seeds = f"{report['seeds']} seeds from {report['seed']}, mean ± half the range over the seeds"
    rows = [["the model alone", "", *show_row(report["alone"])]]
    rows += [["reconstructed real digits", "", *show_row(report["floor"])]]
    rows += [[row["search"], SCORERS[row["scorer"]], *show_row(row)] for row in report["rows"]]
    titles = [title for title, _ in FIGURES.values()]
    table = markdown_table(["search", "scorer", *titles, "% of the gap closed"], rows)
    return f"`{report['command']}`: {report['images']:,} images per search and seed, {seeds}.\n\n{table.rstrip()}\n"


def show_row(row: Mapping[str, Any]) -> list[str]:
    """The cells of one row."""
    cells = [show(row[name], digits) for name, (_, digits) in FIGURES.items()]
    return [*cells, show(row["closed"], 0) if "closed" in row else ""]


@command("gap")
def main(arguments: list[str] | None = None) -> str:
    parser = argparse.ArgumentParser("bench.gap", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for figures and the table")
    parser.add_argument("--images", type=int, default=5000, help="images per search and seed (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="repeats of every search (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    options = parser.parse_args(arguments)
    for name, least in (("images", LEAST_IMAGES), ("seeds", 1)):
        require(name, getattr(options, name), least)
    found = run(options.out, options.images, options.seeds, pick_local_device(options.device))
    if found is None:
        return "This process has finished its searches. Call again without torchrun to write the table."
    report = {"command": describe_command(parser, options, ("images", "seeds", "device")), **found}
    write_json(options.out / "gap.json", report)
    write_text(options.out / "gap.md", markdown(report))
    return markdown(report)


if __name__ == "__main__":
    sys.exit(main())
