"""Sums of scorers: scores added by hand, the features that each part gets, and what is refused."""

import copy
import json
import pickle
import warnings

import pytest
import torch
from torch import nn

from tests.helpers import NUM_CLASSES, TINY_SIDES, idle, randomise, small_scorer, small_var
from tests.search.test_best_of_m import Reading, mean_feature
from varkern import BestOfM, BlockResample, PublishedScorer, SumOfScorers, generate, patch
from varkern.spec import ModelSpec

LABELS = torch.tensor([3, 0, 5])
SPEC = ModelSpec(NUM_CLASSES, TINY_SIDES, (6, 6), 8, 64)


def two_scorers():
    return small_scorer(), randomise(small_scorer(), 9).eval().requires_grad_(False)


def features_of(count=4, batch=3, seed=0):
    return torch.randn(batch, count, 8, 6, 6, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("batch, count", [(3, 4), (1, 1), (0, 4)])
def test_scores_are_added_by_hand(batch, count):
    first, second = two_scorers()
    features, labels = features_of(count, batch), LABELS[:batch]
    for scale in range(5):
        by_hand = first(labels, features, scale).double() + second(labels, features, scale).double()
        total = SumOfScorers(first, second)(labels, features, scale)
        assert total.shape == (batch, count) and total.dtype == torch.float32
        assert torch.allclose(total.double(), by_hand, rtol=0, atol=1e-5)


def test_one_or_three_or_nested():
    first, second = two_scorers()
    features = features_of()
    a, b, c = (f(LABELS, features, 2) for f in (first, second, mean_feature))
    assert torch.equal(SumOfScorers(first)(LABELS, features, 2), a)
    assert torch.allclose(SumOfScorers(first, second, mean_feature)(LABELS, features, 2), a + b + c, atol=1e-5)
    nested = SumOfScorers(SumOfScorers(first, second), mean_feature)
    assert torch.allclose(nested(LABELS, features, 2), a + b + c, atol=1e-5)
    assert torch.allclose(SumOfScorers(first, first)(LABELS, features, 2), 2 * a, atol=1e-6)


@pytest.mark.parametrize("search", [BestOfM, BlockResample], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("share", [1.0, 0.5], ids=["sum", "mean"])
def test_images_are_those_of_a_sum_written_by_hand(search, share):
    """And the mean of two is their sum at twice the temperature."""
    first, second = two_scorers()

    def by_hand(labels, features, scale):
        return share * (first(labels, features, scale) + second(labels, features, scale))

    options = {"m": 6, "pick": "resample", "temperature": 0.02}
    wanted = generate(small_var(), LABELS, search=search(by_hand, **options), seeds=4)
    options["temperature"] /= share
    got = generate(small_var(), LABELS, search=search(SumOfScorers(first, second), **options), seeds=4)
    alone = generate(small_var(), LABELS, search=search(first, **options), seeds=4)
    assert torch.equal(got.images, wanted.images)
    assert not torch.equal(got.images, alone.images)


@pytest.mark.parametrize(
    "wishes, asked, got",
    [
        (({}, {}), (torch.float32, False), [(torch.float32, "NCHW")] * 2),
        (
            ({"input_dtype": torch.bfloat16, "channels_last": True},) * 2,
            (torch.bfloat16, True),
            [(torch.bfloat16, "NHWC")] * 2,
        ),
        (
            ({"input_dtype": torch.bfloat16, "channels_last": True}, {}),
            (torch.float32, False),
            [(torch.bfloat16, "NHWC"), (torch.float32, "NCHW")],
        ),
        (
            ({"input_dtype": torch.bfloat16}, {"input_dtype": torch.float16, "channels_last": True}),
            (torch.float32, False),
            [(torch.bfloat16, "NCHW"), (torch.float16, "NHWC")],
        ),
    ],
    ids=["nothing", "the same", "one", "different"],
)
def test_each_gets_the_features_it_asks_for(wishes, asked, got):
    readers = [Reading(**wish) for wish in wishes]
    joined = SumOfScorers(*readers)
    assert (joined.input_dtype, joined.channels_last) == asked
    generate(small_var(), LABELS, seeds=0, search=BestOfM(joined, m=3, maps_at_once=4))
    assert [set(reader.got) for reader in readers] == [{one} for one in got]


def test_half_precision_scores_are_added_in_float32():
    def half(value):
        return lambda labels, features, scale: torch.full(features.shape[:2], value, dtype=torch.bfloat16)

    total = SumOfScorers(half(256.0), half(1.0))(LABELS, features_of(), 0)
    assert total.dtype == torch.float32 and (total == 257).all()  # bfloat16 has no 257


def test_nan_of_one_is_never_kept():
    def broken(labels, features, scale):
        scores = mean_feature(labels, features, scale)
        return scores.where(torch.arange(scores.shape[1]) == 2, torch.nan)

    result = generate(small_var(), LABELS, search=BestOfM(SumOfScorers(mean_feature, broken), m=4), seeds=0)
    assert all((choice == 2).all() for choice in result.choices[1:])


def test_every_part_moves_to_the_device():
    first, second = two_scorers()
    joined = SumOfScorers(first, mean_feature, SumOfScorers(second))
    assert len(list(joined.parameters())) == len(list(first.parameters())) + len(list(second.parameters()))
    joined.double()
    assert first.dtype == second.dtype == torch.float64
    # A part of which only the second lies elsewhere is found too.
    second.to("meta")
    with pytest.raises(NotImplementedError):  # nothing can be copied out of "meta": so it was to be moved
        generate(small_var(), LABELS, search=BestOfM(joined, m=2), seeds=0)


def test_repr_copy_and_pickle():
    joined = SumOfScorers(small_scorer(), PublishedScorer(nn.Identity()), mean_feature)
    wanted = "SumOfScorers(Scorer, PublishedScorer(Identity), mean_feature)"
    assert repr(BestOfM(joined, m=2)).startswith(f"BestOfM({wanted}, m=2")
    assert repr(BlockResample(joined)).startswith(f"BlockResample({wanted}, m=8")
    both = SumOfScorers(*two_scorers())
    features = features_of()
    for other in (copy.deepcopy(both), pickle.loads(pickle.dumps(both))):
        assert torch.equal(other(LABELS, features, 1), both(LABELS, features, 1))
        assert other.scorers[0] is other.networks[0] and other.scorers[0] is not both.scorers[0]


def test_bad_scorers():
    with pytest.raises(ValueError, match=r"^scorers must be at least one for SumOfScorers, got none$"):
        SumOfScorers()
    with pytest.raises(TypeError, match=r"^scorer must be callable, got int$"):
        SumOfScorers(mean_feature, 3)
    with pytest.raises(TypeError, match=r"^scorer must be callable, got the class Scorer$"):
        SumOfScorers(type(small_scorer()))
    with pytest.raises(TypeError, match=r"wrap it by varkern.PublishedScorer"):
        SumOfScorers(lambda x, class_labels, stage_label: x)


@pytest.mark.parametrize("search", [BestOfM, BlockResample], ids=lambda kind: kind.__name__)
def test_a_list_is_refused(search):
    wanted = r"^scorer must be one scorer, got a list: add several by varkern.SumOfScorers\(...\)$"
    with pytest.raises(TypeError, match=wanted):
        search([mean_feature, mean_feature])


def test_every_part_must_fit_the_model():
    fits, other = small_scorer(), small_scorer(channels=4)
    for scorers in ((fits, other), (other, fits), (fits, SumOfScorers(other))):
        with pytest.raises(ValueError, match=r"^scorer was made for channels=4, but the model has channels=8$"):
            BestOfM(SumOfScorers(*scorers)).check(SPEC)
    BestOfM(SumOfScorers(fits, mean_feature)).check(SPEC)
    model = small_var()
    patch(model, BestOfM(SumOfScorers(mean_feature, fits)))
    with idle(model), pytest.raises(ValueError, match=r"label .* must be in 0..6, the scorer's classes, got 7"):
        model.autoregressive_infer_cfg(2, -1)


def test_a_part_that_returns_another_shape():
    def flat(labels, features, scale):
        return torch.zeros(features.shape[0], 1)

    def number(labels, features, scale):
        return 1.0

    with pytest.raises(ValueError, match=r"scorer must return scores of shape \[3, 4\], got \[3, 1\]"):
        SumOfScorers(mean_feature, flat)(LABELS, features_of(), 0)
    with pytest.raises(TypeError, match=r"scorer must return a tensor, got float"):
        SumOfScorers(mean_feature, number)(LABELS, features_of(), 0)


def test_a_changed_weight_needs_another_graph():
    from varkern.graphs import weights_of

    first, second = two_scorers()
    search = BestOfM(SumOfScorers(first, second))
    before = list(weights_of(search))
    assert list(weights_of(search)) == before
    with torch.no_grad():
        second.out_proj.bias.add_(1)
    assert list(weights_of(search)) != before


@pytest.mark.parametrize("search", [BestOfM, BlockResample, SumOfScorers], ids=lambda kind: kind.__name__)
def test_a_scorer_on_top_of_another_is_not_used_alone(search):
    first, second = two_scorers()
    made_of = {"pick": "resample", "scorers": [{"file": "first.safetensors", "sha256": "ab"}]}
    second.metadata = {"training": json.dumps({"data": {"generated": made_of}})}
    message = (
        "scorer was trained on top of first.safetensors, so its own scores are not enough: use varkern.SumOfScorers"
    )
    with pytest.warns(UserWarning, match=message):
        search(second)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        search(SumOfScorers(first, second))
        second.metadata = {"training": "no JSON"}
        search(second)
