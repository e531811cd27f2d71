"""Effective sample sizes against a plain form, and what the steps of a search over blocks tell."""

import json

import numpy as np
import pytest
import torch

from tests.helpers import small_scorer, small_var
from tests.search.test_best_of_m import mean_feature
from varkern import BestOfM, BlockResample, DensitySearch, SumOfScorers, generate
from varkern.search import effective_sample_size

LABELS = torch.tensor([3, 0, 5])
INF = float("inf")


def plainly(scores, temperature):
    """(sum of weights)² / sum of squared weights of one choice, in float64, term by term."""
    scores = np.asarray(scores, np.float64) / temperature
    weights = [np.exp(score - max(scores)) for score in scores]
    return sum(weights) ** 2 / sum(weight**2 for weight in weights)


@pytest.mark.parametrize("count", [1, 2, 7, 64])
@pytest.mark.parametrize("temperature", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_sizes(count, temperature, dtype):
    scores = (5 * torch.randn(3, 2, count, generator=torch.Generator().manual_seed(count))).to(dtype)
    found = effective_sample_size(scores, temperature)
    assert found.shape == (3, 2) and found.dtype == torch.promote_types(dtype, torch.float32)
    wanted = [[plainly(row.double().numpy(), temperature) for row in image] for image in scores]
    assert np.allclose(found.double().numpy(), wanted, rtol=1e-5)


@pytest.mark.parametrize(
    "scores, wanted",
    [
        ([3.0] * 5, 5.0),
        ([1e4, 0.0, 0.0], 1.0),
        ([0.0, 0.0, -INF, -INF], 2.0),
        ([-INF, -INF, -INF], 3.0),
        ([INF, 0.0, INF], 2.0),
        ([-1e30, -1e30 + 1e24, -1e30], 1.0),
    ],
    ids=str,
)
def test_ends(scores, wanted):
    assert effective_sample_size(torch.tensor(scores)).item() == pytest.approx(wanted)


def test_it_is_the_variance_of_a_weighted_mean():
    """A mean over N values with these weights varies as one over that many: 4,000 repeats, a chance below 1e-6."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(30, generator=generator)
    values = torch.randn(4000, 30, generator=generator, dtype=torch.float64)
    variance = (values * scores.double().softmax(0)).sum(1).square().mean().item()
    # The mean of 4,000 squared normal numbers errs by sqrt(2 / 4000) = 2.2%: five of that is below 1e-6.
    assert variance * effective_sample_size(scores).item() == pytest.approx(1, rel=5 * np.sqrt(2 / 4000))


def test_of_a_generation():
    search = BestOfM(small_scorer(), m=(1, 3, 1, 4, 6), pick="resample")
    result = generate(small_var(), LABELS, search=search, seeds=0)
    found = result.effective_sample_size(0.5)
    assert [size is None for size in found] == [True, False, True, False, False] and result.steps == [None] * 5
    for size, scores in zip(found, result.scores, strict=True):
        if size is not None:
            assert np.allclose(size.double(), [plainly(row, 0.5) for row in scores.tolist()], rtol=1e-5)


@pytest.mark.parametrize("pick", ["resample", "best"])
def test_steps_of_blocks(pick):
    """Rebuilt from the scores and picks alone: what is kept has the score with which the next step begins."""
    search = BlockResample(mean_feature, m=3, proposals=2, sweeps=2, pick=pick, temperature=0.05)
    result = generate(small_var(), LABELS.repeat(4), search=search, seeds=1)
    sizes = result.effective_sample_size(0.05)
    assert result.steps[0] is None and sizes[0] is None
    for scale in range(1, 5):
        steps, scores = result.steps[scale], result.scores[scale]
        count = 2 * np.prod(search.num_blocks(scale, ([1, 2, 3, 4, 6][scale],) * 2))
        assert steps.scores.shape == (12, count, 3) and steps.picks.shape == steps.changed.shape == (12, count)
        assert torch.equal(scores[:, 3:], steps.scores[:, :, 1:].flatten(1))
        score = scores[:, :3].gather(1, result.choices[scale][:, None])[:, 0]
        for step in range(count):
            assert torch.equal(steps.scores[:, step, 0], score)
            score = steps.scores[:, step].gather(1, steps.picks[:, step, None])[:, 0]
        if pick == "best":
            assert torch.equal(steps.picks, steps.scores.argmax(-1))
        assert not (steps.changed & (steps.picks == 0)).any()
        other = steps.scores[:, :, 0] != steps.scores.gather(2, steps.picks[:, :, None])[:, :, 0]
        assert (steps.changed >= other).all()  # a map of another score is another map
        wanted = steps.changed.double().numpy().mean(0)
        assert np.allclose(steps.acceptance(), wanted) and steps.acceptance().shape == (count,)
        assert np.allclose(sizes[scale].double(), [plainly(row, 0.05) for row in scores[:, :3].tolist()], rtol=1e-5)
        of_steps = steps.effective_sample_size(0.05)
        assert np.allclose(
            of_steps.double(), [[plainly(row, 0.05) for row in image] for image in steps.scores.tolist()], rtol=1e-5
        )
    assert 0 < result.steps[4].acceptance().mean() < 1


def test_an_equal_proposal_changes_nothing():
    """Almost all mass on one token: proposals are kept half of the time, and are what was there before."""
    result = generate(small_var(), LABELS, search=BlockResample(mean_feature, m=1, proposals=1), seeds=0, top_k=1)
    assert all(steps.picks.any() for steps in result.steps[1:])
    assert not any(steps.changed.any() for steps in result.steps[1:])


def test_a_search_without_steps():
    result = generate(small_var(), LABELS, search=DensitySearch(n=4, alpha=1.0), seeds=0)
    assert result.steps == [None] * 5
    blocks = generate(small_var(), LABELS, search=BlockResample(mean_feature, m=3, proposals=0), seeds=0)
    assert blocks.steps == [None] * 5 and blocks.effective_sample_size()[1].shape == (3,)


class TestFittedTemperatures:
    FITTED = (1.0, 0.03, 0.005, 0.02, 0.008)

    def scorer(self, fitted=FITTED):
        scorer = small_scorer()
        scorer.metadata = {} if fitted is None else {"temperatures": json.dumps(fitted)}
        return scorer

    @pytest.mark.parametrize("kind", [BestOfM, BlockResample], ids=lambda kind: kind.__name__)
    @pytest.mark.parametrize("scale", range(1, 5))
    def test_each_scale_has_its_own(self, kind, scale):
        """As with the number of the one searched scale."""
        where = {"m": 6, "first_scale": scale, "last_scale": scale, "pick": "resample"}
        fitted = kind(self.scorer(), temperature="fitted", **where)
        number = kind(self.scorer(), temperature=self.FITTED[scale], **where)
        other = kind(self.scorer(), **where)
        images = [generate(small_var(), LABELS.repeat(8), search=s, seeds=3).images for s in (fitted, number, other)]
        assert torch.equal(images[0], images[1])
        assert not torch.equal(images[0], images[2])
        assert "temperature='fitted'" in repr(fitted) and "temperature=1.0" in repr(other)

    def test_the_default_ignores_them(self):
        with_them, without = (BestOfM(self.scorer(f), m=6, pick="resample") for f in (self.FITTED, None))
        images = [generate(small_var(), LABELS, search=search, seeds=3).images for search in (with_them, without)]
        assert torch.equal(*images) and with_them.temperature == 1.0

    @pytest.mark.parametrize("kind", [BestOfM, BlockResample], ids=lambda kind: kind.__name__)
    def test_a_scorer_without_them(self, kind):
        message = r"temperature='fitted' needs a scorer whose file has fitted temperatures, .* got {} without"
        for scorer, name in (
            (self.scorer(None), "Scorer"),
            (mean_feature, "mean_feature"),
            (SumOfScorers(self.scorer()), r"SumOfScorers\(Scorer\)"),
        ):
            with pytest.raises(ValueError, match=message.format(name)):
                kind(scorer, temperature="fitted")
        with pytest.raises(ValueError, match="temperature must be a finite number > 0, got 'fit'"):
            kind(self.scorer(), temperature="fit")

    @pytest.mark.parametrize("text", ["[1, 2]", "no JSON", "3", "[1, 1, 1, 1, 0]", "[1, 1, 1, 1, NaN]"])
    def test_metadata_that_are_no_temperatures(self, text):
        scorer = self.scorer(None)
        scorer.metadata = {"temperatures": text}
        with pytest.raises(ValueError, match="temperatures in a scorer's metadata must be 5 numbers > 0, got"):
            BestOfM(scorer, temperature="fitted")
