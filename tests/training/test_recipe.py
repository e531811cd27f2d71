"""The losses of LSRS against float64 forms written as the paper prints them, and what a recipe accepts."""

import math

import pytest
import torch

from varkern.training.recipe import ScorerTraining, pairwise_loss, pointwise_loss, wins

SCORES = torch.tensor([-80.0, -3.0, -0.5, 0.0, 0.25, 4.0, 60.0])


def minus_log_sigmoid(x: float) -> float:
    return max(-x, 0.0) + math.log1p(math.exp(-abs(x)))


@pytest.fixture
def pairs():
    return torch.meshgrid(SCORES, SCORES, indexing="ij")


def test_pairwise_is_equation_4(pairs):
    real, generated = pairs
    wanted = torch.tensor([[minus_log_sigmoid(r - g) for g in SCORES.tolist()] for r in SCORES.tolist()])
    assert torch.allclose(pairwise_loss(real, generated), wanted, rtol=1e-6, atol=0)


def test_pointwise_is_equation_5(pairs):
    real, generated = pairs

    def both(r, g):  # 1 - sigmoid(g) is sigmoid(-g)
        return (minus_log_sigmoid(r) + minus_log_sigmoid(-g)) / 2

    wanted = torch.tensor([[both(r, g) for g in SCORES.tolist()] for r in SCORES.tolist()])
    assert torch.allclose(pointwise_loss(real, generated), wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("loss", [pairwise_loss, pointwise_loss])
def test_equal_scores_of_nothing_cost_log_2(loss):
    assert loss(torch.zeros(3), torch.zeros(3)).tolist() == pytest.approx([math.log(2)] * 3)


@pytest.mark.parametrize("loss, wanted", [(pairwise_loss, [-0.5, 0.5]), (pointwise_loss, [-0.25, 0.25])])
def test_gradients_at_zero(loss, wanted):
    scores = torch.zeros(2, requires_grad=True)
    loss(scores[0], scores[1]).backward()
    assert scores.grad.tolist() == wanted


def test_a_draw_is_half_a_win():
    assert wins(torch.tensor([1.0, 2.0, -1.0]), torch.tensor([2.0, 1.0, -1.0])).tolist() == [0.0, 1.0, 0.5]


def test_defaults_are_the_papers():
    """Appendix A, for ImageNet's 1.28 million images."""
    training = ScorerTraining()
    assert (training.batch_size, training.learning_rate, training.epochs, training.loss) == (128, 3e-4, 4, "pairwise")
    assert training.weight_decay == 0 and training.max_norm is None and training.betas == (0.9, 0.999)
    assert training.steps(1_280_000) == (40_000, 10_000)


def test_steps_are_rounded_up():
    assert ScorerTraining(epochs=1.5, warmup_epochs=0.1, batch_size=8).steps(10) == (2, 1)
    assert ScorerTraining(epochs=0.01, warmup_epochs=0, batch_size=8).steps(3) == (1, 0)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"loss": "hinge"}, "loss must be one of pairwise, pointwise, got 'hinge'"),
        ({"features": "all"}, "features must be one of fused, own, got 'all'"),
        ({"precision": "float16"}, "precision must be one of auto, float32, bfloat16, got 'float16'"),
        ({"first_scale": -1}, "first_scale must be >= 0, got -1"),
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"epochs": 0.0}, "epochs must be a finite number > 0, got 0.0"),
        ({"learning_rate": math.nan}, "learning_rate must be a finite number > 0, got nan"),
        ({"warmup_epochs": 5.0}, r"warmup_epochs must be in \[0, epochs=4.0\], got 5.0"),
        ({"validation": 1.0}, r"validation must be in \[0, 1\), got 1.0"),
        ({"max_norm": 0.0}, "max_norm must be > 0 or None, got 0.0"),
        ({"weight_decay": -0.1}, "weight_decay must be a finite number >= 0, got -0.1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        ScorerTraining(**changes)


def test_precision():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert ScorerTraining().precision_on(cpu) == "float32" and ScorerTraining().precision_on(gpu) == "bfloat16"
    assert ScorerTraining(precision="float32").precision_on(gpu) == "float32"
