"""What is wrong with a request is told before any work and before any random state changes; what is right is taken."""

import re

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers import NUM_CLASSES, caches_closed, idle, small_scorer, small_var
from tests.standins.models import small_flexvar, small_infinity
from varkern import BestOfM, UnsupportedModelError, check, checks, generate, patch

LABELS = torch.tensor([3, 0])
FIVE = torch.tensor([3, 0, 5, 5, 2])
IMAGE_SEEDS = torch.tensor([11, -4, 2**62, 11, 0])
MULTINOMIAL = {"sampler": "multinomial"}
# How errors name what the published method and ``generate`` call by different words.
LABEL = r"label \(label_B, labels\) must be "
SEED, SEED_TENSOR = r"seed \(g_seed, seeds\) must be ", r"seed \(g_seed, seeds\) as a tensor must be "


def mean_feature(labels, features, scale):
    return features.mean((2, 3, 4))


def best_of():
    return BestOfM(mean_feature, m=3)


SEARCHES = {"none": None, "best": best_of(), "two best": BestOfM(mean_feature, m=4, pick=2, maps_at_once=3)}


def test_numpy_integers_of_the_patched_method():
    model = patch(small_var(), best_of())
    wanted = model.autoregressive_infer_cfg(2, 3, 5, top_k=20)
    given = model.autoregressive_infer_cfg(np.int64(2), np.int32(3), np.int64(5), top_k=np.uint8(20))
    assert torch.equal(given, wanted)
    patch(model, **MULTINOMIAL)
    plain = model.autoregressive_infer_cfg(2, 3, 5, top_k=20)
    given = model.autoregressive_infer_cfg(np.int64(2), np.int32(3), np.int64(5), top_k=np.uint8(20))
    assert torch.equal(given, plain)


def lasting(value) -> str:
    """A test's id that is the same in every process: a function's address is not."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"label_B": NUM_CLASSES + 1}, ValueError, LABEL + r"in 0..7, got 8"),
        ({"label_B": torch.tensor([1, 9])}, ValueError, LABEL + r"in 0..7, got 1..9"),
        ({"label_B": torch.tensor([-1, 1])}, ValueError, LABEL + r"in 0..7, got -1..1"),
        ({"label_B": torch.tensor([1])}, ValueError, LABEL + r"integers of shape \[2\], got .* \[1\]"),
        ({"label_B": torch.tensor([1.0, 2.0])}, ValueError, LABEL + r"integers of shape \[2\], got torch.float32"),
        ({"label_B": torch.tensor([True, False])}, ValueError, LABEL + r"integers of shape \[2\], got torch.bool"),
        ({"label_B": True}, TypeError, LABEL + r"an int, a tensor or None, got bool"),
        ({"label_B": "cat"}, TypeError, LABEL + r"an int, a tensor or None, got str"),
        ({"label_B": [1, 2]}, TypeError, LABEL + r"an int, a tensor or None, got list"),
        ({"B": -1}, ValueError, r"batch size \(B\) must be an int >= 0, got -1"),
        ({"B": 2.0}, ValueError, r"batch size \(B\) must be an int >= 0, got 2.0"),
        ({"B": True}, ValueError, r"batch size \(B\) must be an int >= 0, got True"),
        ({"B": np.int64(-1)}, ValueError, r"batch size \(B\) must be an int >= 0, got .*-1"),
        ({"top_k": -1}, ValueError, r"top_k must be an int >= 0, got -1"),
        ({"top_k": 2.5}, ValueError, r"top_k must be an int >= 0, got 2.5"),
        ({"top_k": True}, ValueError, r"top_k must be an int >= 0, got True"),
        ({"top_p": 1.5}, ValueError, r"top_p must be in \[0, 1\], got 1.5"),
        ({"top_p": float("nan")}, ValueError, r"top_p must be in \[0, 1\], got nan"),
        ({"top_p": "0.9"}, (TypeError, ValueError), r"top_p must be .*\[0, 1\], got '?0.9"),
        ({"cfg": float("inf")}, ValueError, r"cfg must be a finite number or .*, got inf"),
        ({"cfg": float("nan")}, ValueError, r"cfg must be a finite number or .*, got nan"),
        ({"cfg": "1.5"}, ValueError, r"cfg must be a finite number or .*, got '1.5'"),
        ({"cfg": torch.zeros(3, 1, 1)}, ValueError, r"cfg must be .*\[2, 1, 1\], got shape \[3, 1, 1\]"),
        ({"g_seed": 1.5}, TypeError, SEED + r"an int, .* got float"),
        ({"g_seed": True}, TypeError, SEED + r"an int, .* got bool"),
        ({"g_seed": 2**64}, ValueError, SEED + r".*, got 18446744073709551616"),
        ({"g_seed": -(2**63) - 1}, ValueError, SEED + r".*, got -9223372036854775809"),
        ({"g_seed": torch.zeros(2)}, ValueError, SEED_TENSOR + r"int64 of shape \[2\], got torch.float32"),
        ({"g_seed": torch.zeros(3).long()}, ValueError, SEED_TENSOR + r"int64 of shape \[2\], got .*\[3\]"),
    ],
    ids=str,
)
@pytest.mark.parametrize("sampler", ["philox", "multinomial"])
def test_bad_arguments_of_the_patched_method_are_named_before_any_work(arguments, error, message, sampler):
    if sampler == "multinomial" and isinstance(arguments.get("g_seed"), torch.Tensor):
        error, message = ValueError, "sampler 'multinomial'"  # takes no tensor, whatever is in it
    model = patch(small_var(), best_of(), sampler=sampler)
    with idle(model), pytest.raises(error, match=message):
        model.autoregressive_infer_cfg(**({"B": 2, "label_B": LABELS, "g_seed": 0} | arguments))
    assert caches_closed(model)


@pytest.mark.parametrize("labels", [torch.tensor([1, 7]), 7, -1], ids=str)
@pytest.mark.parametrize("sampler", ["philox", "multinomial"])
@pytest.mark.parametrize("seed", [0, None], ids=["seed", "fresh"])
def test_labels_that_the_scorer_does_not_know_change_no_random_state(labels, sampler, seed):
    model = patch(small_var(), BestOfM(small_scorer()), sampler=sampler)
    with idle(model), pytest.raises(ValueError, match=LABEL + r"in 0..6, the scorer's classes, got 7"):
        model.autoregressive_infer_cfg(2, labels, seed)


def test_multinomial_takes_no_image_seeds():
    model = patch(small_var(), **MULTINOMIAL)
    with idle(model), pytest.raises(ValueError, match=SEED + "an int or None for sampler 'multinomial'"):
        model.autoregressive_infer_cfg(2, LABELS, torch.zeros(2, dtype=torch.int64))


class Waits(TorchDispatchMode):
    """Counts reads of a tensor's value by the host."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("labels", [FIVE, 3, None], ids=["tensor", "int", "drawn"])
@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES)
def test_the_host_reads_the_labels_range_once_and_nothing_else(search, labels, monkeypatch):
    looked = []
    monkeypatch.setattr(checks, "label_range", lambda request, spec: looked.append(request.labels) or (0, 5))
    model = small_var()
    with Waits() as waits:
        generate(model, labels, seeds=IMAGE_SEEDS, search=search, top_k=30, top_p=0.9)
    assert len(looked) == 1 and looked[0] is labels and waits.count == 0


def test_a_search_is_told_the_highest_label():
    told = []

    class Told(BestOfM):
        def check_labels(self, highest, spec):
            told.append((highest, spec.num_classes))

    model = small_var()
    for labels in (FIVE, FIVE.flip(0).tolist(), 4, -1, NUM_CLASSES):
        generate(model, labels, seeds=IMAGE_SEEDS, search=Told(mean_feature))
    assert told == [(highest, NUM_CLASSES) for highest in (5, 5, 4, NUM_CLASSES, NUM_CLASSES)]
    assert all(type(highest) is int for highest, _ in told)
    generate(model, None, seeds=IMAGE_SEEDS, search=Told(mean_feature))  # labels that are drawn fit
    assert len(told) == 5


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8], ids=lambda kind: kind.__name__)
def test_numpy_integers_of_generate(kind):
    model = small_var()
    search = BestOfM(mean_feature, m=kind(3), pick=kind(2), first_scale=kind(0), last_scale=kind(3))
    plain = BestOfM(mean_feature, m=3, pick=2, first_scale=0, last_scale=3)
    wanted = generate(model, 4, seeds=9, batch_size=3, top_k=20, search=plain).images
    given = generate(model, kind(4), seeds=kind(9), batch_size=kind(3), top_k=kind(20), search=search).images
    assert torch.equal(given, wanted)
    by_scale = BestOfM(mean_feature, m=[kind(m) for m in (1, 2, 1, 1, 3)])
    wanted = generate(model, 4, seeds=9, search=BestOfM(mean_feature, m=(1, 2, 1, 1, 3))).images
    assert torch.equal(generate(model, 4, seeds=9, search=by_scale).images, wanted)


@pytest.mark.parametrize(
    "labels, options, error, message",
    [
        (FIVE, {"seeds": IMAGE_SEEDS[:2]}, ValueError, r"labels, seeds and batch_size must agree .* got \[2, 5\]"),
        (FIVE, {"batch_size": 3}, ValueError, r"labels, seeds and batch_size must agree .* got \[3, 5\]"),
        (None, {}, ValueError, r"batch_size must be given when labels is None and seeds is not a tensor"),
        (FIVE, {"colour": 1}, ValueError, r"a VAR model has no option 'colour': it takes cfg, more_smooth"),
        (FIVE, {"sampler": "sobol"}, ValueError, r"sampler must be one of 'philox', 'multinomial', got 'sobol'"),
        ([0.5], {}, ValueError, LABEL + r"integers of shape \[1\], got torch.float32"),
        ([True, False], {}, ValueError, LABEL + r"integers of shape \[2\], got torch.bool"),
        (FIVE[None], {"seeds": IMAGE_SEEDS[:1]}, ValueError, LABEL + r"integers of shape \[1\], .*\[1, 5\]"),
        ([99], {}, ValueError, LABEL + r"in 0..7, got 99"),
        ([3, -1], {}, ValueError, LABEL + r"in 0..7, got -1"),
        (99, {}, ValueError, LABEL + r"in 0..7, got 99"),
        (True, {}, (TypeError, ValueError), LABEL + r".*got .*bool"),
        (FIVE, {"seeds": [1, 2, 3, 4, 5]}, TypeError, SEED + r"an int, .* got list"),
        (FIVE, {"seeds": IMAGE_SEEDS.int()}, ValueError, SEED_TENSOR + r"int64 of shape \[5\], got torch.int32"),
        (FIVE, {"seeds": True}, TypeError, SEED + r"an int, .* got bool"),
        (FIVE, {"seeds": -(2**63) - 1}, ValueError, SEED),
        (FIVE, {"seeds": 2**64}, ValueError, SEED),
        (FIVE, {"seeds": 2**64, "sampler": "multinomial"}, ValueError, SEED),
        (FIVE, {"seeds": -(2**63) - 1, "sampler": "multinomial"}, ValueError, SEED),
        (None, {"batch_size": True}, ValueError, r"batch size \(B\) must be an int >= 0, got True"),
        (FIVE, {"search": mean_feature}, TypeError, r"search must be a search such as .*, got function"),
        (FIVE, {"search": BestOfM(mean_feature, first_scale=5)}, ValueError, r"first_scale must be < 5, .* got 5"),
    ],
    ids=lasting,
)
def test_bad_arguments_of_generate_are_named_before_any_work(labels, options, error, message):
    model = small_var()
    with idle(model), pytest.raises(error, match=message):
        generate(model, labels, **options)
    with idle(model), pytest.raises(error, match=message):
        check(model, options.pop("search", None), labels=labels, **options)
    assert caches_closed(model)


@pytest.mark.parametrize("sampling", [{}, {"top_k": 3}, {"labels": FIVE, "seeds": IMAGE_SEEDS, "cfg": 2.0}], ids=str)
def test_a_check_changes_nothing_and_gives_the_models_sizes(sampling):
    model, scorer = small_var(), small_scorer().to("meta")
    with idle(model):
        spec = check(model, [BestOfM(scorer, m=4)], **sampling)
    assert (spec.num_classes, spec.num_scales, spec.vocabulary) == (NUM_CLASSES, 5, model.V)
    assert {p.device.type for p in scorer.parameters()} == {"meta"}


def test_a_check_of_what_generate_cannot_serve():
    model, vae = small_flexvar(64)
    assert check(model, best_of()) is None  # the VAE comes with each call
    assert check(model, best_of(), vqvae=vae, infer_patch_nums=[1, 2, 3]).num_scales == 3
    with pytest.raises(ValueError, match="vqvae"):
        check(model, best_of(), infer_patch_nums=[1, 2, 3])
    texts, _ = small_infinity()
    assert check(texts, best_of()) is None
    with pytest.raises(UnsupportedModelError, match="generate needs a class-conditional model"):
        check(texts, best_of(), cfg=3.0)
    with pytest.raises(UnsupportedModelError):
        check(torch.nn.Linear(1, 1))
