"""The training loop: its learning rate, clipping and bookkeeping, and a killed run that ends like an unbroken one."""

import math
import os
import threading

import pytest
import torch
from torch import nn

from varkern.training import loop
from varkern.training.loop import fit, schedule

STEPS, KILLED_AT = 14, 9


class TestSchedule:
    @pytest.mark.parametrize("warmup", [1, 7, 100])
    def test_warm_up_is_linear_to_the_peak(self, warmup):
        shares = [schedule(step, 1000, warmup) for step in range(warmup)]
        assert shares == pytest.approx([(step + 1) / warmup for step in range(warmup)], rel=1e-12)
        assert shares[-1] == 1 and schedule(warmup, 1000, warmup) == 1

    @pytest.mark.parametrize("warmup", [0, 1, 20])
    def test_a_cosine_falls_to_zero(self, warmup):
        shares = torch.tensor([schedule(step, 220, warmup) for step in range(warmup, 221)], dtype=torch.float64)
        assert shares[0] == 1 and shares[-1].abs() < 1e-15
        turn = torch.linspace(0, math.pi, 221 - warmup, dtype=torch.float64)
        assert torch.allclose(shares, (turn.cos() + 1) / 2, atol=1e-12)
        assert (shares.diff() < 0).all()

    def test_a_run_that_is_all_warm_up(self):
        assert [schedule(step, 4, 8) for step in range(4)] == [0.125, 0.25, 0.375, 0.5]
        assert schedule(4, 4, 4) == 1


class Noisy(nn.Module):
    """A linear layer behind dropout, with a buffer."""

    def __init__(self):
        super().__init__()
        self.linear, self.dropout = nn.Linear(5, 3), nn.Dropout(0.3)
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x):
        self.seen += 1
        return self.linear(self.dropout(x))


class Run:
    """One training of a small model on random batches, with a tensor that it carries; it may be killed at a step."""

    def __init__(self, checkpoint, seed=4):
        torch.manual_seed(0)
        self.model, self.carried = Noisy(), {"counts": torch.zeros(3)}
        self.checkpoint, self.seed, self.ran = checkpoint, seed, []

    def go(self, killed_at=None, **options):
        def batch_loss(step):
            assert self.model.training
            if step == killed_at:
                raise KeyboardInterrupt
            self.ran.append(step)
            return self.model(torch.randn(8, 5)).square().mean() * 10

        def after_step(step):
            self.carried["counts"] += torch.rand(3) * step

        fit(
            "test",
            self.model,
            batch_loss,
            steps=STEPS,
            learning_rate=0.05,
            seed=self.seed,
            checkpoint=self.checkpoint,
            warmup=4,
            after_step=after_step,
            carried=self.carried,
            **options,
        )
        return self

    def state(self):
        return {**self.model.state_dict(), **self.carried}


def differing(first, second):
    assert first.state().keys() == second.state().keys()
    return [name for name, value in first.state().items() if not torch.equal(value, second.state()[name])]


@pytest.fixture
def every_step(monkeypatch):
    """A checkpoint after each step."""
    monkeypatch.setattr(loop, "SECONDS_BETWEEN_CHECKPOINTS", -1.0)


class TestResume:
    def test_a_killed_run_ends_like_an_unbroken_one(self, tmp_path, every_step):
        unbroken = Run(tmp_path / "unbroken.pt").go()
        killed = Run(tmp_path / "killed.pt")
        with pytest.raises(KeyboardInterrupt):
            killed.go(KILLED_AT)
        assert killed.checkpoint.is_file() and differing(killed, unbroken)
        resumed = Run(tmp_path / "killed.pt")
        torch.manual_seed(77)  # the state that the process happens to be in
        resumed.go()
        assert resumed.ran == list(range(KILLED_AT, STEPS))
        assert differing(resumed, unbroken) == []
        assert unbroken.model.seen[0] == STEPS and unbroken.carried["counts"].min() > 0

    def test_work_after_the_last_checkpoint_is_done_again(self, tmp_path, monkeypatch, every_step):
        unbroken = Run(tmp_path / "unbroken.pt").go()
        killed = Run(tmp_path / "killed.pt")
        save = loop.write_checkpoint
        monkeypatch.setattr(loop, "write_checkpoint", lambda path, state: state["step"] > 5 or save(path, state))
        with pytest.raises(KeyboardInterrupt):
            killed.go(KILLED_AT)
        resumed = Run(tmp_path / "killed.pt").go()
        assert resumed.ran == list(range(5, STEPS))
        assert differing(resumed, unbroken) == []

    def test_a_kill_while_a_checkpoint_is_written(self, tmp_path, monkeypatch, every_step):
        unbroken = Run(tmp_path / "unbroken.pt").go()
        killed, written = Run(tmp_path / "killed.pt"), []

        def half(descriptor):
            written.append(descriptor)
            if len(written) == KILLED_AT:
                os.ftruncate(descriptor, 100)
                raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, "fsync", half)
            killed.go()
        resumed = Run(tmp_path / "killed.pt").go()
        assert resumed.ran == list(range(KILLED_AT - 1, STEPS))
        assert differing(resumed, unbroken) == []

    def test_other_settings_are_refused(self, tmp_path, every_step):
        with pytest.raises(KeyboardInterrupt):
            Run(tmp_path / "run.pt").go(KILLED_AT, settings={"batch": 8, "maps": [1, 2]})
        with pytest.raises(ValueError, match=r"run\.pt was made with other settings \(batch was 8, now 9\)"):
            Run(tmp_path / "run.pt").go(settings={"batch": 9, "maps": [1, 2]})
        assert Run(tmp_path / "run.pt").go(settings={"batch": 8, "maps": [1, 2]}).ran == list(range(KILLED_AT, STEPS))

    def test_a_file_that_is_no_checkpoint(self, tmp_path):
        (tmp_path / "run.pt").write_bytes(b"half")
        with pytest.raises(ValueError, match=r"run\.pt is not a readable checkpoint, remove it to start again"):
            Run(tmp_path / "run.pt").go()

    def test_what_is_trained_is_saved_before_the_checkpoint_goes(self, tmp_path, every_step):
        run, there = Run(tmp_path / "run.pt"), []
        run.go(begin=there.append, finish=lambda: there.append(run.checkpoint.exists()))
        assert there == [0, True] and not run.checkpoint.exists()

    def test_a_rank_beside_the_first_writes_nothing(self, tmp_path, every_step):
        run = Run(tmp_path / "run.pt").go(main=False, finish=lambda: pytest.fail("finished"))
        assert list(tmp_path.iterdir()) == [] and run.ran == list(range(STEPS))
        assert not [thread for thread in threading.enumerate() if "Refresh" in type(thread).__name__]

    def test_nothing_but_the_model_is_left(self, tmp_path, every_step):
        run = Run(tmp_path / "run.pt").go()
        assert list(tmp_path.iterdir()) == [] and not run.model.training

    def test_no_checkpoint_within_the_first_minute(self, tmp_path):
        killed = Run(tmp_path / "run.pt")
        with pytest.raises(KeyboardInterrupt):
            killed.go(KILLED_AT)
        assert list(tmp_path.iterdir()) == []

    def test_the_seed_matters(self, tmp_path):
        assert "linear.weight" in differing(Run(tmp_path / "a.pt").go(), Run(tmp_path / "b.pt", seed=5).go())

    def test_a_checkpoint_is_never_unpickled(self, tmp_path):
        torch.save({"model": Run(tmp_path / "a.pt").model}, tmp_path / "run.pt")
        with pytest.raises(Exception, match=r"weights_only|Unsupported"):
            Run(tmp_path / "run.pt").go()


def trained(loss, tmp_path, **options):
    """One parameter ``[3]`` from zero: its values after each step, and its gradients as the optimizer saw them."""
    model = nn.ParameterDict({"x": nn.Parameter(torch.zeros(3, dtype=torch.float64))})
    values, gradients = [torch.zeros(3, dtype=torch.float64)], []

    def after_step(step):
        values.append(model["x"].detach().clone())
        gradients.append(model["x"].grad.clone())

    fit(
        "test",
        model,
        lambda step: loss(model["x"]),
        seed=0,
        checkpoint=tmp_path / "run.pt",
        after_step=after_step,
        **options,
    )
    return torch.stack(values), torch.stack(gradients)


def test_steps_follow_the_schedule(tmp_path):
    # Under a constant gradient Adam's step is the learning rate itself, whatever the gradient's size.
    values, _ = trained(
        lambda x: (x * torch.tensor([0.5, -0.1, 0.01])).sum(),
        tmp_path,
        steps=30,
        learning_rate=0.2,
        warmup=6,
        weight_decay=0.0,
    )
    wanted = torch.tensor([0.2 * schedule(step, 30, 6) for step in range(30)], dtype=torch.float64)
    steps = -values.diff(dim=0) * torch.tensor([1.0, -1.0, 1.0])
    assert torch.allclose(steps, wanted.unsqueeze(1).expand(-1, 3), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("max_norm", [0.25, 1.0])
@pytest.mark.parametrize("gradient", [[3.0, -4.0, 12.0], [0.06, 0.08, 0.0]], ids=["large", "small"])
def test_gradients_are_clipped_to_max_norm(gradient, max_norm, tmp_path):
    gradient = torch.tensor(gradient, dtype=torch.float64)
    _, seen = trained(lambda x: (x * gradient).sum(), tmp_path, steps=3, learning_rate=0.1, max_norm=max_norm)
    wanted = gradient * min(1.0, max_norm / gradient.norm().item())
    assert torch.allclose(seen, wanted.expand(3, -1), rtol=1e-5)


def test_gradients_may_stay_as_they_are(tmp_path):
    _, seen = trained(lambda x: 1e3 * x.sum(), tmp_path, steps=3, learning_rate=0.1, max_norm=None)
    assert (seen == 1e3).all()


def test_parameters_without_gradients_stay(tmp_path):
    model = nn.ParameterDict({"x": nn.Parameter(torch.ones(2)), "y": nn.Parameter(torch.ones(2), requires_grad=False)})
    fit(
        "test",
        model,
        lambda step: (model["x"] * model["y"]).sum(),
        steps=3,
        learning_rate=0.1,
        seed=0,
        checkpoint=tmp_path / "run.pt",
    )
    assert (model["x"] < 1).all() and (model["y"] == 1).all()


def test_weights_decay(tmp_path):
    def after(weight_decay):
        options = {"steps": 8, "learning_rate": 0.1, "warmup": 0, "weight_decay": weight_decay}
        return trained(lambda x: -x.sum(), tmp_path, **options)[0]

    plain, decayed = after(0.0), after(0.5)
    wanted = [0.0]
    for step in range(8):
        rate = 0.1 * schedule(step, 8, 0)
        wanted.append(wanted[-1] * (1 - 0.5 * rate) + rate)
    assert torch.allclose(decayed[:, 0], torch.tensor(wanted, dtype=torch.float64), rtol=1e-5)
    assert (plain[-1] > decayed[-1]).all()
