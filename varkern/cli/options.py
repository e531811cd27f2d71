"""Options that several commands share, and the functions that parse them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer

from varkern.data import file_sha256
from varkern.demo.run import WEIGHTS
from varkern.hub import locate
from varkern.runs import describe_file
from varkern.scorer import Scorer
from varkern.search import BestOfM, BlockResample, SumOfScorers

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Dtype = Literal["float32", "bfloat16", "float16"]

Device = Annotated[str, typer.Option(help="Device to compute on: auto, cpu, cuda or cuda:N")]
Seed = Annotated[int, typer.Option(help="Base seed; every image gets its own seed derived from it")]
Var = Annotated[str, typer.Option(help="VAR checkpoint, or one of the names d16, d20, d24, d30, d36, demo")]
Vae = Annotated[Path | None, typer.Option(help="VQ-VAE checkpoint; not needed if --var is a name")]
ScorerFile = Annotated[
    str | None,
    typer.Option(
        help="Scorer: a file, a folder, or a repository on the hub as user/repo or user/repo@revision; default: that "
        "of the demo, else none"
    ),
]
ScorerFiles = Annotated[
    list[str] | None,
    typer.Option(
        help="Scorer: a file, a folder, or a repository on the hub as user/repo or user/repo@revision; may be given "
        "several times, each trained on top of those before it; default: that of the demo, else none"
    ),
]
Classes = Annotated[str, typer.Option("--classes", "--class", help="Classes of the images, such as 207,88 or 0-9")]
NumPerClass = Annotated[int, typer.Option(help="Number of images per class")]
FirstScale = Annotated[int, typer.Option(help="First searched scale, counted from 0")]
LastScale = Annotated[int | None, typer.Option(help="Last searched scale; default: the model's last")]
Pick = Annotated[
    str, typer.Option(help="Rule for the kept candidate: best, resample, or k to resample among the k best")
]
Proposals = Annotated[
    int,
    typer.Option(
        help="Number of other candidates tried at each block of a map that was chosen among --m whole maps; 0: none"
    ),
]
Sweeps = Annotated[int, typer.Option(help="Number of times that every block is tried, with --proposals")]
PickOrDefault = Annotated[
    str | None,
    typer.Option(
        "--pick",
        help="Rule for the kept candidate: best, resample, or k to resample among the k best; default: best, or "
        "resample with --proposals",
    ),
]
Temperature = Annotated[
    str,
    typer.Option(
        help="Temperature of the softmax over scores when resampling: a number; fitted: those in the scorer's file"
    ),
]
Cfg = Annotated[float, typer.Option(help="Strength of guidance at the last scale; 0: no guidance")]
TopK = Annotated[int, typer.Option(help="Number of most probable tokens to keep; 0: all")]
TopP = Annotated[float, typer.Option(help="Probability mass of the tokens to keep, after --top-k; 0: all")]
BatchSize = Annotated[int, typer.Option(help="Number of images per batch")]
WeightsDtype = Annotated[Dtype, typer.Option(help="Data type of the model's weights")]
Autocast = Annotated[Dtype | None, typer.Option(help="Data type for torch.autocast; default: no autocast")]


def require(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} must be >= {least}, got {value}")


def pick_device(name: str) -> torch.device:
    """Return the device of ``--device``.

    Raises:
        ValueError: if this machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device must be present, got {name!r}, but PyTorch {torch.__version__} finds "
            f"{torch.cuda.device_count()} GPUs"
        )
    return device


def parse_classes(text: str) -> list[int]:
    """Parse classes such as ``207,88`` or ``0-9,20``; their order is kept.

    Raises:
        ValueError: if ``text`` is not such a list.
    """
    classes: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})(?:-(\d{1,9}))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last or last - first >= 1_000_000:
            raise ValueError(f"classes must be numbers and ranges such as 207,88 or 0-9, got {text!r}")
        classes.extend(range(first, last + 1))
    return classes


def pick_local_device(name: str) -> torch.device:
    """Return the device of ``--device``; under ``torchrun``, auto and cuda mean the GPU of this process."""
    local = os.environ.get("LOCAL_RANK", "")
    if name in ("auto", "cuda") and local.isdecimal() and torch.cuda.is_available():
        name = f"cuda:{local}"
    return pick_device(name)


def parse_m(text: str | None, scorer: object) -> int | list[int]:
    """Parse the number of candidates, or one number per scale; None gives 4 with a scorer (a true value), else 1.

    Raises:
        ValueError: if ``text`` is not such a number, or is above 1 without a scorer.
    """
    if text is None:
        return 4 if scorer else 1
    if not re.fullmatch(r"-?\d{1,9}(,\d{1,9})*", text):
        raise ValueError(f"m must be a number, or one number per scale such as 1,4,4,8, got {text!r}")
    numbers = [int(part) for part in text.split(",")]
    if not scorer and max(numbers) > 1:
        raise ValueError(f"m must be 1 without a scorer, got {text}: give --scorer")
    return numbers[0] if len(numbers) == 1 else numbers


def build_search(scorer: Any, settings: Mapping[str, Any], proposals: int, sweeps: int) -> BestOfM | BlockResample:
    """The search of the options; ``settings``: the arguments of :class:`varkern.BestOfM`, by name.

    Raises:
        ValueError, TypeError: if an option is out of its range.
    """
    if not proposals:
        require("sweeps", sweeps, 1)
        return BestOfM(scorer, **settings)
    return BlockResample(scorer, proposals=proposals, sweeps=sweeps, **settings)


def parse_temperature(text: str) -> Any:
    """Parse a number. Any other text, such as ``fitted``, is returned as it is, and the search checks it."""
    try:
        return float(text)
    except ValueError:
        return text


def parse_pick(text: str) -> str | int:
    return int(text) if re.fullmatch(r"-?\d{1,9}", text) else text


def find_scorer(var: str, scorer: str | None) -> Path | None:
    """Return the scorer's file, downloaded if a repository is named; the default for the demo model is its own scorer.

    Raises:
        OSError, ValueError, ImportError: see :func:`varkern.hub.locate`.
    """
    if scorer is None:
        return WEIGHTS / "scorer.safetensors" if var == "demo" else None
    return locate(scorer)


def describe_scorer(scorer: str | None, file: Path | None) -> dict[str, Any] | str | None:
    """Describe a scorer for settings: a file by path, size and time; one from the hub by name and checksum."""
    if scorer is None or Path(scorer).exists():
        return describe_file(file)
    return {"repository": scorer, "sha256": file_sha256(file)}


def find_scorers(var: str, scorers: Sequence[str] | None) -> list[Path]:
    """Return the files of ``--scorer``, which may be given several times; empty if there is none.

    Raises:
        OSError, ValueError, ImportError: see :func:`varkern.hub.locate`.
    """
    found = [find_scorer(var, scorer) for scorer in scorers or [None]]
    return [path for path in found if path is not None]


def load_scorers(files: Sequence[Path], device: torch.device) -> Any:
    """Load one scorer, or the sum of several; None if there is none.

    Raises:
        OSError, ValueError: if a file is no scorer, or a further one was trained by itself.
    """
    networks = [Scorer.from_pretrained(path, device=device) for path in files]
    for path, network in zip(files[1:], networks[1:], strict=True):
        if not network.on_top_of:
            raise ValueError(
                f"scorer: the scores of several are added, so each must be trained on top of those before it, but "
                f"{path.name} was trained by itself, as far as its file tells"
            )
    if len(networks) < 2:
        return networks[0] if networks else None
    return SumOfScorers(*networks)


def describe_scorers(scorers: Sequence[str] | None, files: Sequence[Path]) -> Any:
    """Describe what :func:`load_scorers` loads, for settings; one scorer as :func:`describe_scorer` does."""
    if len(files) < 2:
        return describe_scorer(scorers[0] if scorers else None, files[0] if files else None)
    return list(map(describe_scorer, scorers or [], files))
