"""The CSV of a training that may be killed at any byte, TensorBoard where there is one, and the shares of time."""

import csv
import sys
import types

import pytest
import torch

from varkern.training.log import Log, Stopwatch, read_rows

COLUMNS = ["step", "loss", "accuracy"]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "scorer.csv"


def write(path, rows, start=0):
    log = Log(path, COLUMNS, start)
    for row in rows:
        log.write(row)
    log.close()


def test_rows(path):
    write(path, [{"step": 3, "loss": 0.25}, {"step": 6, "loss": 1 / 3, "accuracy": 1.0}])
    assert path.read_bytes() == b"step,loss,accuracy\r\n3,0.25,\r\n6,0.33333333,1\r\n"


def test_rows_beyond_the_checkpoint_are_dropped(path):
    write(path, [{"step": step, "loss": 0.5} for step in (3, 6, 9)])
    write(path, [{"step": 9, "loss": 0.75}], start=6)
    assert [(row["step"], row["loss"]) for row in read_rows(path, COLUMNS)] == [
        ("3", "0.5"),
        ("6", "0.5"),
        ("9", "0.75"),
    ]


def test_a_kill_while_a_row_is_written_keeps_the_rows_before(path, monkeypatch):
    log = Log(path, COLUMNS, 0)
    log.write({"step": 3, "loss": 0.5})
    before = path.read_bytes()
    monkeypatch.setattr(csv.DictWriter, "writerows", lambda *rows: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        log.write({"step": 6, "loss": 0.5})
    assert path.read_bytes() == before


def test_a_file_of_other_columns_is_begun_again(path):
    path.write_text("step,loss\n3,0.5\n")
    write(path, [], start=9)
    assert path.read_text() == "step,loss,accuracy\n"


def test_tensorboard(path, monkeypatch):
    """A stand-in for the package, which is not needed and may not be installed."""
    scalars, opened = [], []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            opened.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            scalars.append((name, value, step))

        def close(self):
            opened.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    write(path, [{"step": 3, "loss": 0.5}, {"step": 6, "loss": 0.25, "accuracy": 1.0}], start=2)
    assert scalars == [("loss", 0.5, 3), ("loss", 0.25, 6), ("accuracy", 1.0, 6)]
    assert opened == [(str(path.with_suffix(".tensorboard")), 3), "closed"]


def test_no_tensorboard(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    write(path, [{"step": 3, "loss": 0.5}])
    assert [p.name for p in path.parent.iterdir()] == ["scorer.csv"]


def test_shares_of_time(monkeypatch):
    times = iter([0.0, 1.0, 4.0, 10.0, 11.0, 12.0])
    monkeypatch.setattr("varkern.training.log.time.perf_counter", lambda: next(times))
    watch = Stopwatch(torch.device("cpu"))
    assert watch.shares() == {}
    watch.start(0)
    watch.lap("data")
    watch.lap("model")
    watch.start(1)
    watch.lap("data")
    watch.lap("model")
    assert watch.shares() == {"data": 2 / 6, "model": 4 / 6}


def test_a_gpu_is_waited_for_at_few_steps(monkeypatch):
    waits = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: waits.append(device))
    watch = Stopwatch(torch.device("cuda"))
    for step in range(64):
        watch.start(step)
        watch.lap("data")
        watch.lap("model")
    assert len(waits) == 4 * 3 and sum(watch.shares().values()) == pytest.approx(1)
