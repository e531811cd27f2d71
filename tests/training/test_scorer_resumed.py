"""Training of a scorer that was killed, ran out of disk, was done already, or was made with other settings."""

import errno
import functools
import os
import random
import shutil
import signal
from dataclasses import replace

import pytest
import torch

from varkern import Scorer
from varkern.training import loop
from varkern.training import scorer as training_scorer
from varkern.training.scorer import read_facts

from .small import (
    CONFIG,
    TRAINING,
    differing,
    end_at,
    interrupt,
    rows_of,
    small_datasets,
    start_child,
    steps_in,
    train,
    wait_for,
    without_times,
)

KILLS = 8


class TestKilled:
    def test_at_random_moments(self, folder, tmp_path, every_step):
        """Killed again and again, half-written checkpoints and all, the weights end equal to the last bit."""
        out, moments = tmp_path / "scorer.safetensors", random.Random(0)
        checkpoint, resumed_at = out.with_suffix(".checkpoint.pt"), set()

        def killed(moment):
            end_at(moment)
            train(folder, out, every=3)

        for _ in range(KILLS):
            work = functools.partial(killed, moments.randint(1, 8))
            assert wait_for(start_child(work)) == -signal.SIGKILL
            if checkpoint.exists():
                resumed_at.add(torch.load(checkpoint, weights_only=True)["step"])
                out.with_name(checkpoint.name + ".partial").write_bytes(checkpoint.read_bytes()[:500])
        assert not out.exists() and len(resumed_at) > 2
        assert any(0 < step < steps_in(folder)[0] for step in resumed_at), "no kill fell into the training itself"
        assert wait_for(start_child(lambda: train(folder, out, every=3))) == 0
        assert differing(out, folder / "unbroken.safetensors") == []
        assert without_times(rows_of(out.with_suffix(".csv"))) == without_times(rows_of(folder / "unbroken.csv"))
        assert not checkpoint.exists()

    def test_before_the_scorer_was_saved(self, folder, tmp_path, monkeypatch, every_step):
        """All steps are done and in the checkpoint; the scorer, with its validation, is still to be written."""
        out, save = tmp_path / "scorer.safetensors", Scorer.save_pretrained

        def killed(*given):
            raise KeyboardInterrupt

        monkeypatch.setattr(Scorer, "save_pretrained", killed)
        with pytest.raises(KeyboardInterrupt):
            train(folder, out)
        assert not out.exists() and out.with_suffix(".checkpoint.pt").exists()
        monkeypatch.setattr(Scorer, "save_pretrained", save)
        facts = train(folder, out)
        unbroken = read_facts(folder / "unbroken.safetensors")
        assert facts["validation"]["accuracy"] == unbroken["validation"]["accuracy"]
        assert not out.with_suffix(".checkpoint.pt").exists()

    def test_a_full_disk(self, folder, tmp_path, monkeypatch, every_step):
        """The error names the cause, the former checkpoint stays, and a run with room ends like an unbroken one."""
        out, writes = tmp_path / "scorer.safetensors", []

        def full(descriptor):
            writes.append(descriptor)
            if len(writes) == 4:
                os.ftruncate(descriptor, 100)
                raise OSError(errno.ENOSPC, "No space left on device")

        def run():
            with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left on device, while writing"):
                patch.setattr(os, "fsync", full)
                train(folder, out, every=3)
            assert torch.load(out.with_suffix(".checkpoint.pt"), weights_only=True)["step"] == 3
            assert not list(tmp_path.glob("*.partial"))
            train(folder, out, every=3)

        assert wait_for(start_child(run)) == 0
        assert differing(out, folder / "unbroken.safetensors") == []

    @pytest.mark.parametrize("seconds", [-1.0, 1e9], ids=["checkpoint", "scorer"])
    def test_a_file_size_limit(self, seconds, folder, tmp_path, monkeypatch):
        """The system refuses the write itself, of a checkpoint or of the scorer at the end."""
        out = tmp_path / "scorer.safetensors"
        monkeypatch.setattr(loop, "SECONDS_BETWEEN_CHECKPOINTS", seconds)

        def run():
            import resource  # does not exist on Windows, which cannot fork either

            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
            with pytest.raises(OSError, match=r"(?i)file too large"):
                train(folder, out)

        assert wait_for(start_child(run)) == 0
        assert not out.exists() and not list(tmp_path.glob("*.pt")) and not list(tmp_path.glob("*.partial"))


class TestAgain:
    def test_a_finished_scorer_is_not_trained_again(self, folder, tmp_path, monkeypatch):
        out = shutil.copy(folder / "unbroken.safetensors", tmp_path / "scorer.safetensors")
        (tmp_path / "scorer.checkpoint.pt").write_bytes(b"left behind by a kill after the scorer was saved")
        monkeypatch.setattr(training_scorer, "fit", lambda *given, **options: pytest.fail("trained again"))
        assert train(folder, out) == read_facts(out)
        assert [path.name for path in tmp_path.iterdir()] == ["scorer.safetensors"]

    @pytest.mark.parametrize(
        "changes, message",
        [
            ({"loss": "pointwise"}, "loss was 'pairwise', now 'pointwise'"),
            ({"seed": 6}, "seed was 5, now 6"),
            ({"batch_size": 4}, "batch_size was 8, now 4"),
            ({"epochs": 3.0}, "epochs was 2.0, now 3.0"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    @pytest.mark.parametrize("state", ["begun", "finished"])
    def test_other_settings_are_refused(self, state, changes, message, folder, tmp_path, monkeypatch, every_step):
        out = tmp_path / "scorer.safetensors"
        if state == "finished":
            shutil.copy(folder / "unbroken.safetensors", out)
        else:
            interrupt(monkeypatch, folder, out)
        before = {path: path.read_bytes() for path in tmp_path.iterdir()}
        with pytest.raises(ValueError, match=message):
            train(folder, out, replace(TRAINING, **changes))
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before

    def test_other_maps_are_refused(self, folder, tmp_path, monkeypatch, every_step):
        interrupt(monkeypatch, folder, tmp_path / "scorer.safetensors")
        small_datasets(tmp_path / "others", real=51)
        with pytest.raises(ValueError, match=r"made with other settings \(real was '"):
            train(tmp_path / "others", tmp_path / "scorer.safetensors")

    def test_restart(self, folder, tmp_path, monkeypatch, every_step):
        out = tmp_path / "scorer.safetensors"
        interrupt(monkeypatch, folder, out)
        training = replace(TRAINING, epochs=0.5, seed=7)
        train(folder, out, training, restart=True)
        assert read_facts(out)["settings"]["seed"] == 7
        assert [int(row["step"]) for row in rows_of(out.with_suffix(".csv"))] == [3]

    def test_a_checkpoint_that_is_none(self, folder, tmp_path):
        (tmp_path / "scorer.checkpoint.pt").write_bytes(b"half")
        with pytest.raises(ValueError, match=r"scorer\.checkpoint\.pt is not a readable checkpoint, remove it"):
            train(folder, tmp_path / "scorer.safetensors")

    def test_a_checkpoint_is_never_unpickled(self, folder, tmp_path):
        torch.save({"model": CONFIG, "settings": {}}, tmp_path / "scorer.checkpoint.pt")
        with pytest.raises(ValueError, match=r"(?s)not a readable checkpoint.*Unsupported global"):
            train(folder, tmp_path / "scorer.safetensors")
