"""``python -m bench.demo_tables``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bench.commands import command, describe_command
from varkern.cli.options import pick_local_device, require
from varkern.demo.run import WEIGHTS
from varkern.extras import require_matplotlib
from varkern.runs import write_text

from . import __doc__ as about
from . import page, tables


@command("demo_tables")
def main(arguments: list[str] | None = None) -> str:
    parser = argparse.ArgumentParser("bench.demo_tables", description=about.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the figures and scorers")
    parser.add_argument("--page", type=Path, help="page to put the tables into")
    parser.add_argument("--tables", nargs="+", default=[], metavar="NAME", help="the only tables to make; default: all")
    parser.add_argument("--images", type=int, default=2000, help="images per cell and seed (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="repeats of every cell (default: %(default)s)")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder of `varkern demo train`")
    parser.add_argument("--device", default="cpu", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    options = parser.parse_args(arguments)
    words = describe_command(parser, options, ("tables", "images", "seeds", "weights", "device"))
    require("images", options.images, 2)
    require("seeds", options.seeds, 1)
    if unknown := [name for name in options.tables if name not in tables.presets()]:
        raise ValueError(f"tables must be among {', '.join(tables.presets())}, got {unknown[0]!r}")
    require_matplotlib("digits")
    device = pick_local_device(options.device)
    if options.page:
        page.fill(options.page.read_text(), dict.fromkeys(page.list_tables(), ""))
    given = (options.out, options.images, options.seeds, device, options.weights, words)
    written = tables.run(*given, names=options.tables)
    if not written:
        return "This process has finished its cells. Call again without torchrun to measure times and write the tables."
    text = f"wrote {len(written)} files of figures to {options.out}"
    if options.page:
        write_text(options.page, page.fill(options.page.read_text(), page.read_tables(options.out), page.list_tables()))
        text += f"\nput the tables into {options.page}"
    return text


if __name__ == "__main__":
    sys.exit(main())
