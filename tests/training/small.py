"""A small VQ-VAE, scorer and pair of token-map datasets to train on, children that can be killed, and what is left."""

from __future__ import annotations

import csv
import faulthandler
import functools
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers import small_vae
from varkern import ScorerConfig
from varkern.data import Batch, Manifest, TokenMaps, write_token_maps
from varkern.ops import use_backend
from varkern.training import scorer as training_scorer
from varkern.training.features import FeatureMaker
from varkern.training.pairs import Pairs, make_pairs
from varkern.training.recipe import ScorerTraining
from varkern.training.scorer import train_scorer

SIDES = (1, 2, 4)
VOCABULARY, NUM_CLASSES, LENGTH = 64, 3, 21
CONFIG = ScorerConfig(
    num_classes=NUM_CLASSES, num_scales=3, channels=8, size=4, widths=(8,), embedding=4, hidden=(8, 8), dropout=0.0
)
TRAINING = ScorerTraining(epochs=2.0, warmup_epochs=0.5, batch_size=8, learning_rate=3e-3, validation=0.2, seed=5)


@functools.cache
def import_optimizers() -> None:
    """The first optimizer of a process imports much of PyTorch, and Triton: here once, not once in every child.

    Not when this file is imported, which may be before ``tests/conftest.py`` has set Triton's switch.
    """
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])


def maker(sides: Sequence[int] = SIDES) -> FeatureMaker:
    return FeatureMaker.of_quantizer(small_vae(sides).quantize)


def write_maps(folder: Path, labels: Sequence[int], tokens: torch.Tensor, **changes) -> TokenMaps:
    """A dataset of given labels ``[N]`` and tokens ``[N, L]``, in shards of ten."""
    labels = torch.as_tensor(labels)
    settings = {"patch_nums": SIDES, "vocabulary": VOCABULARY, "num_classes": NUM_CLASSES, "total": len(labels)}
    manifest = Manifest(**(settings | changes), source={"made": "for a test"}, batch_size=5, shard_size=10)
    write_token_maps(folder, manifest, lambda parts: (Batch(tokens[list(p)], labels[list(p)]) for p in parts))
    return TokenMaps.open(folder)


def random_tokens(count: int, seed: int, high: int = VOCABULARY, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(0, high, (count, length), generator=torch.Generator().manual_seed(seed))


CHILD_SECONDS = 120.0  # a child that takes longer hangs


def small_datasets(
    folder: Path, real: int = 50, generated: int = 40, codes: int = VOCABULARY // 2
) -> tuple[TokenMaps, TokenMaps]:
    """Real maps of the first ``codes`` codes, generated ones of all: a scorer can tell them apart."""
    first = write_maps(folder / "real", torch.arange(real) % NUM_CLASSES, random_tokens(real, 1, codes))
    return first, write_maps(folder / "generated", torch.arange(generated) % NUM_CLASSES, random_tokens(generated, 2))


def train(folder: Path, out: Path, training: ScorerTraining = TRAINING, **options) -> dict:
    """Train the small scorer on the datasets in ``folder``, by the plain PyTorch forms."""
    maps = (TokenMaps.open(folder / "real"), TokenMaps.open(folder / "generated"))
    with use_backend("torch"):
        return train_scorer(*maps, maker(), CONFIG, training, out, **options)


def start_child(work: Callable[[], object]) -> int:
    """Fork a process that does ``work`` on one thread, so that its sums are those of any other such process."""
    import_optimizers()
    if not hasattr(os, "fork"):
        pytest.skip("this system cannot fork")
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        faulthandler.dump_traceback_later(CHILD_SECONDS * 0.75, file=sys.__stderr__)  # where it hangs, if it does
        torch.set_num_threads(1)
        work()
        code = 0
    except BaseException:
        traceback.print_exc(file=sys.__stderr__)
    finally:
        os._exit(code)


def wait_for(pid: int, seconds: float = CHILD_SECONDS) -> int:
    """The exit code of a child, negative for the signal that ended it; it is ended when it takes too long."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise TimeoutError(f"a child was still at work after {seconds} s")


def end_at(moment: int) -> None:
    """End this process by SIGKILL at its ``moment``-th event: a training step, or what is done to write a file.

    A file has three events: it is about to reach the disk, to get its name, and has its name. So the moment of a kill
    is a number, and not a time, which differs from machine to machine.
    """
    left = [moment]

    def event() -> None:
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    def before(function: Callable) -> Callable:
        return lambda *given, **named: (event(), function(*given, **named))[1]

    def after(function: Callable) -> Callable:
        return lambda *given, **named: (function(*given, **named), event())[0]

    training_scorer.Trainer.batch_loss = before(training_scorer.Trainer.batch_loss)
    os.fsync, os.replace = before(os.fsync), after(before(os.replace))


def free_port() -> str:
    """A port for processes that look for each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def differing(first: Path, second: Path) -> list[str]:
    tensors = [load_file(path) for path in (first, second)]
    assert tensors[0].keys() == tensors[1].keys()
    return [name for name, value in tensors[0].items() if not torch.equal(value, tensors[1][name])]


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def without_times(rows):
    times = ("examples_per_second", "data_share", "fuse_share", "model_share")
    return [{name: value for name, value in row.items() if name not in times} for row in rows]


def steps_in(folder: Path) -> tuple[int, int]:
    """Steps in all and in the warm-up of the default settings."""
    return TRAINING.steps(len(pairs_in(folder).training))


def pairs_in(folder: Path) -> Pairs:
    """The pairs that the default settings make of the datasets in ``folder``."""
    maps = (TokenMaps.open(folder / "real"), TokenMaps.open(folder / "generated"))
    return make_pairs(*maps, TRAINING.validation, TRAINING.seed)


def interrupt(monkeypatch, folder, out, step=3, training=TRAINING):
    """A run that ended at ``step`` and left its checkpoint."""
    loss = training_scorer.Trainer.batch_loss

    def interrupted(trainer, number):
        if number == step:
            raise KeyboardInterrupt
        return loss(trainer, number)

    with monkeypatch.context() as patch:
        patch.setattr(training_scorer.Trainer, "batch_loss", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(folder, out, training)
    assert out.with_suffix(".checkpoint.pt").exists()
