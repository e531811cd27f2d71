"""The command ``varkern``.

Wrong input gets one line on stderr and exit code 2; an interrupted run gets one line and exit code 130. ``varkern
--traceback COMMAND`` shows where an error came from instead.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from rich.console import Console

import varkern
from varkern.demo import run as demo_run
from varkern.evaluation import sampling
from varkern.models import load_var
from varkern.scorer import Scorer
from varkern.search import BestOfM

WRONG_INPUT, INTERRUPTED, OUT_OF_MEMORY = 2, 130, 1
LONGEST_MESSAGE = 600
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Dtype = Literal["float32", "bfloat16", "float16"]
# Typer raises this class's kin for wrong options; where it lives differs between Typer's releases.
UsageError = typer.BadParameter.__base__

app = typer.Typer(
    name="varkern",
    help="Best-of-M sampling for visual autoregressive (VAR) image models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
demo_app = typer.Typer(invoke_without_command=True)
app.add_typer(demo_app, name="demo", help="The digits model that ships with varkern: see, retrain or measure it.")

Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")]
Seed = Annotated[int, typer.Option(help="From which every image's own seed is made")]


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    traceback = arguments[:1] == ["--traceback"]
    try:
        code = app(arguments, prog_name="varkern", standalone_mode=False)
        code = code if isinstance(code, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except UsageError as error:
        # `varkern` alone raises one whose message is the help that was printed already.
        return complain(error.format_message()) if error.format_message() else WRONG_INPUT
    except torch.OutOfMemoryError as error:
        if traceback:
            raise
        return complain(f"out of memory, try a smaller --batch-size: {error}", OUT_OF_MEMORY)
    except (ValueError, OSError, ImportError, varkern.UnsupportedModelError) as error:
        if traceback:
            raise
        return complain(str(error) or type(error).__name__)
    return complain("interrupted", INTERRUPTED) if code == INTERRUPTED else code


def complain(message: str, code: int = WRONG_INPUT) -> int:
    """Print ``message`` on stderr as one line; returns ``code``."""
    line = " ".join(message.split())
    if len(line) > LONGEST_MESSAGE:
        line = line[:LONGEST_MESSAGE] + " ..."
    print(f"varkern: {line}", file=sys.stderr)
    return code


def print_version(wanted: bool) -> None:
    if wanted:
        print(f"varkern {varkern.__version__}")
        raise typer.Exit()


@app.callback()
def common(
    version: Annotated[bool, typer.Option("--version", callback=print_version, is_eager=True, help="Show it")] = False,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show the traceback of an error")] = False,
) -> None:
    pass


@demo_app.callback()
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


@demo_app.command("train")
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


@demo_app.command("table")
def demo_table(
    out: Annotated[Path, typer.Option(help="Folder for the figures")],
    images: Annotated[int, typer.Option(help="Images a cell")] = 5000,
    seeds: Annotated[int, typer.Option(help="Repeats a cell")] = 3,
    weights: Annotated[Path | None, typer.Option(help="Folder of `demo train`  [the shipped weights]")] = None,
    device: Device = "cpu",
) -> None:
    """Measure what best-of-M does to the digits model, in Fréchet distance, score and accuracy."""
    from varkern.demo import table

    require("images", images, 2)
    require("seeds", seeds, 1)
    where = pick_device(device)
    sampling.open_folder(out)
    print(table.run(out, images, seeds, str(where), weights or table.WEIGHTS))


@app.command()
def sample(
    var: Annotated[str, typer.Option(help="A VAR checkpoint, or d16, d20, d24, d30, d36, demo")],
    classes: Annotated[str, typer.Option(help="Such as 207,88 or 0-9")],
    out: Annotated[Path, typer.Option(help="Folder for the images")],
    vae: Annotated[Path | None, typer.Option(help="The VQ-VAE's checkpoint; not needed for short names")] = None,
    scorer: Annotated[Path | None, typer.Option(help="The scorer; demo brings its own")] = None,
    m: Annotated[str | None, typer.Option(help="Candidates a scale, or one number a scale: 1,4,4,...  [4]")] = None,
    first_scale: Annotated[int, typer.Option(help="The first searched scale, from 0")] = 1,
    last_scale: Annotated[int | None, typer.Option(help="The last searched scale  [the model's last]")] = None,
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
    sampling.require_pillow()
    sampling.open_folder(out)
    model = load_var(var, vae=vae, device=where, dtype=DTYPES[dtype])
    # Built for one candidate too, so that a wrong pick or scale is told even there.
    search = BestOfM(Scorer.from_pretrained(scorer, device=where) if scorer else no_scorer, **search_settings)
    sampling.check_order(model, search, order, batch_size)
    settings = {
        "varkern": varkern.__version__,
        "var": sampling.file_of_setting(var),
        "vae": sampling.file_of_setting(vae),
        "scorer": sampling.file_of_setting(scorer),
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
    sampling.claim(out, settings)
    paths = sampling.fill(out, model, search, order, batch_size)
    sheet = sampling.write_sheet(out, paths, order, num_per_class)
    print(f"{len(paths)} images in {out}, contact sheet {sheet}")


@app.command()
def env(device: Device = "auto") -> None:
    """Versions, device, backend in use and why, extras: what a bug report should hold."""
    from varkern.environment import describe

    for name, value in describe(pick_device(device)).items():
        print(f"{name + ':':<12} {value}")


def require(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} must be >= {least}, got {value}")


def pick_device(name: str) -> torch.device:
    """The device that ``--device`` names.

    Raises:
        ValueError: if there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {name!r} is not here: PyTorch {torch.__version__} sees {torch.cuda.device_count()} GPUs"
        )
    return device


def parse_classes(text: str) -> list[int]:
    """Classes such as ``207,88`` or ``0-9,20``, in the order given.

    Raises:
        ValueError: if ``text`` is no such list.
    """
    classes: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})(?:-(\d{1,9}))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last or last - first >= 1_000_000:
            raise ValueError(f"classes must be numbers and ranges such as 207,88 or 0-9, got {text!r}")
        classes.extend(range(first, last + 1))
    return classes


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


if __name__ == "__main__":
    sys.exit(main())
