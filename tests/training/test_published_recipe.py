"""The published recipe: a share of all pairs, permutations without lists, and the epoch that validated best."""

import itertools
import math
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from varkern import Scorer
from varkern.data import TokenMaps
from varkern.training import scorer as training_scorer
from varkern.training.pairs import ProductPart, make_pairs
from varkern.training.permutation import permute
from varkern.training.recipe import RECIPES, ScorerTraining
from varkern.training.report import judge
from varkern.training.scorer import read_facts

from .small import TRAINING, differing, interrupt, maker, random_tokens, small_datasets, start_child, train, wait_for
from .small import write_maps as write


class TestPermutation:
    @pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 16, 17, 100, 1000, 4096, 4097])
    def test_every_number_once(self, count):
        found = permute(7, count, np.arange(count), 0, 20)
        assert found.dtype == np.int64 and sorted(found) == list(range(count))

    @pytest.mark.parametrize("count", [10**9 + 7, 2**40, 2**40 + 1, 2**61 - 1])
    def test_large_counts_place_by_place(self, count):
        places = np.random.default_rng(0).integers(0, count, 2000)
        places = np.unique(np.append(places, [0, count - 1]))
        found = permute(-3, count, places, 1, 20)
        assert len(np.unique(found)) == len(places) and 0 <= found.min() and found.max() < count
        assert np.array_equal(found[::-1], permute(-3, count, places[::-1], 1, 20))
        # A half of the numbers is below the middle: binomial, and 300 of 2000 are 13 standard deviations.
        assert abs((found < count // 2).sum() - len(found) / 2) < 300

    def test_seed_epoch_and_stream_each_matter(self):
        places = np.arange(1000)
        found = [permute(*key, places, *rest) for key, rest in (((0, 1000), (0, 20)), ((1, 1000), (0, 20)))]
        found += [
            permute(0, 1000, places, 1, 20),
            permute(0, 1000, places, 0, 21),
            permute(2**40, 1000, places, 0, 20),
        ]
        for first, second in itertools.combinations(found, 2):
            assert (first == second).sum() < 20  # one in a thousand by chance: Poisson of mean 1

    @pytest.mark.parametrize("count", [2**18, 1_000_003])
    def test_neighbours_part(self, count):
        """Where two neighbours go, in 16 x 16 boxes: chi-square of 255 degrees, below 400 but for a chance of 1e-7."""
        found = permute(11, count, np.arange(200_000), 0, 20) * 16 // count
        boxes = np.bincount(found[:-1:2] * 16 + found[1::2], minlength=256)
        assert ((boxes - 100_000 / 256) ** 2 / (100_000 / 256)).sum() < 400


COUNTS = {"real": (3, 0, 7, 2, 4), "generated": (5, 4, 2, 1, 0)}  # images of each class


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """Datasets whose classes differ in size, in mixed order; one has no real image, one no generated."""
    folder, found = tmp_path_factory.mktemp("uneven"), []
    for seed, (name, counts) in enumerate(COUNTS.items()):
        labels = np.repeat(np.arange(5), counts)
        labels = np.random.default_rng(seed).permutation(labels)
        found.append(write(folder / name, labels, random_tokens(len(labels), seed), num_classes=5))
    return found


def all_pairs(real, generated):
    return {(i, j) for i, a in enumerate(real.labels) for j, b in enumerate(generated.labels) if a == b}


def drawn(part, epoch):
    places = part.examples(epoch * len(part), (epoch + 1) * len(part))
    return list(zip(*(side.tolist() for side in places), strict=True))


class TestPairs:
    def test_all_pairs_of_a_class(self, uneven):
        part = make_pairs(*uneven, 0.0, 3, pair_share=1.0).training
        assert len(part) == 3 * 5 + 7 * 2 + 2 * 1
        for epoch in range(3):
            pairs = drawn(part, epoch)
            assert set(pairs) == all_pairs(*uneven) and len(pairs) == len(part)
        assert drawn(part, 0) != drawn(part, 1)

    @pytest.mark.parametrize("share", [0.001, 0.1, 0.5])
    def test_a_share_is_the_same_pairs_in_every_epoch(self, share, uneven):
        part = make_pairs(*uneven, 0.0, 3, pair_share=share).training
        first, second = drawn(part, 0), drawn(part, 1)
        assert len(part) == math.ceil(share * 31) == len(set(first))
        assert set(first) == set(second) <= all_pairs(*uneven)
        assert len(part) < 3 or first != second

    def test_every_pair_is_in_the_share_equally_often(self, uneven):
        times, part = Counter(), make_pairs(*uneven, 0.0, 0, pair_share=0.25).training
        places = np.arange(len(part))
        for seed in range(200):
            part.seed = seed
            times.update(zip(*(side.tolist() for side in part.find_pairs(places)), strict=True))
        # Binomial(200, 8/31): 6.5 standard deviations are 40; over 31 pairs a false alarm has probability below 1e-8.
        assert set(times) == all_pairs(*uneven) and all(abs(n - 200 * 8 / 31) < 40 for n in times.values())

    def test_what_is_read(self, uneven):
        real, generated = uneven
        part = make_pairs(real, generated, 0.0, 3, pair_share=1.0).training
        tokens = list(part.batches(range(9), 8))
        pairs = (drawn(part, 0) + drawn(part, 1) + drawn(part, 2))[: 9 * 8]
        for number, batch in enumerate(tokens):
            places, partners = zip(*pairs[number * 8 : number * 8 + 8], strict=True)
            assert torch.equal(batch.real, real.gather(places))
            assert torch.equal(batch.generated, generated.gather(partners))
            assert batch.labels.tolist() == [real.labels[place] for place in places]
        halves = [list(part.batches(range(9), 8, rank, 2)) for rank in range(2)]
        for batch, *parts in zip(tokens, *halves, strict=True):
            assert torch.equal(batch.real, torch.cat([half.real for half in parts]))

    def test_held_out_pairs_are_fixed_and_of_held_out_images(self, uneven):
        pairs = make_pairs(*uneven, 0.4, 3, pair_share=0.5, validation_pairs=1.0)
        held = pairs.validation
        batches = list(held.fixed_batches(3))
        assert sum(len(batch.labels) for batch in batches) == len(held) and len(batches[0].labels) == 3
        again = list(make_pairs(*uneven, 0.4, 3, pair_share=0.1, validation_pairs=1.0).validation.fixed_batches(3))
        assert all(torch.equal(a.real, b.real) for a, b in zip(batches, again, strict=True))
        shared = [list(held.fixed_batches(3, rank, 2)) for rank in range(2)]
        assert sum(map(len, shared)) == len(batches) and torch.equal(shared[1][0].real, batches[1].real)
        seen = set(held.find_pairs(np.arange(len(held)))[0].tolist())
        trained = {place for place, _ in drawn(pairs.training, 0)}
        assert not seen & trained and seen and trained
        assert pairs.left_out == make_pairs(*uneven, 0.4, 3).left_out

    def test_a_billion_pairs_take_no_list(self):
        """A list of them would take 8 GB."""
        maps, places = SimpleNamespace(labels=np.zeros(32_000, np.int64)), np.arange(32_000)
        part = ProductPart(maps, maps, places, places, 0, 0.01)
        assert part.total == 1_024_000_000 and len(part) == 10_240_000
        real, generated = part.examples(5 * len(part) - 1000, 5 * len(part) + 1000)
        assert len(set(zip(real.tolist(), generated.tolist(), strict=True))) > 1990


class TestRecipes:
    def test_the_published_one(self):
        training = RECIPES["published"]
        assert (training.learning_rate, training.batch_size, training.loss) == (3e-4, 128, "pairwise")
        assert (training.epochs, training.warmup_epochs, training.weight_decay) == (4, 1, 0)
        assert (training.validation, training.pair_share, training.validation_pairs) == (0.1, 0.01, 0.1)
        assert (training.best_by, training.precision, training.first_scale) == ("accuracy", "float32", 0)
        # 900 of 1,000 samples meet nine tenths of ImageNet's 1.28 million images, and 1% of these pairs is an epoch.
        assert training.steps(math.ceil(0.01 * 900 * 0.9 * 1_281_167)) == (324_296, 81_074)
        assert RECIPES["paper"] == ScorerTraining()

    def test_a_training_by_it(self, tmp_path):
        small_datasets(tmp_path, 90, 90)
        training = replace(RECIPES["published"], batch_size=8)
        facts = train(tmp_path, tmp_path / "scorer.safetensors", training)
        assert facts["pairs"] == math.ceil(0.01 * 3 * 27 * 27) == 22
        assert facts["held_out"] == math.ceil(0.1 * 3 * 3 * 3) == 3
        assert facts["step"] == math.ceil(4 * 22 / 8) and facts["best_step"] <= facts["step"]

    @pytest.mark.parametrize(
        "changes, message",
        [
            ({"pair_share": 0}, r"pair_share must be in \(0, 1\] or None, got 0"),
            ({"pair_share": 1.5}, r"pair_share must be in \(0, 1\] or None, got 1.5"),
            ({"validation_pairs": -0.1}, r"validation_pairs must be in \(0, 1\] or None, got -0.1"),
            ({"best_by": "luck"}, "best_by must be one of None, accuracy, loss, got 'luck'"),
            ({"best_by": "loss", "validation": 0}, "best_by='loss' needs held-out images, got validation=0"),
        ],
    )
    def test_wrong_settings(self, changes, message):
        with pytest.raises(ValueError, match=message):
            ScorerTraining(**changes)

    def test_nothing_is_held_out(self, tmp_path):
        for name in ("real", "generated"):
            write(tmp_path / name, [0, 1, 2], random_tokens(3, 0))
        with pytest.raises(ValueError, match="best_by='accuracy' needs held-out pairs, got none"):
            train(tmp_path, tmp_path / "scorer.safetensors", replace(TRAINING, best_by="accuracy"))


class TestBest:
    training = replace(
        TRAINING,
        epochs=6.0,
        learning_rate=5e-2,
        pair_share=0.05,
        validation=0.3,
        validation_pairs=0.7,
        best_by="accuracy",
    )

    @pytest.mark.parametrize("by", ["accuracy", "loss"])
    def test_the_best_epoch_is_kept(self, by, folder, tmp_path, monkeypatch):
        """Against a note of the weights at every validation: the first of the best ones is in the file."""
        seen, validate = [], training_scorer.Trainer.validate

        def noted(trainer):
            figures = validate(trainer)
            weights = {name: tensor.clone() for name, tensor in trainer.scorer.state_dict().items()}
            seen.append((figures, weights))
            return figures

        monkeypatch.setattr(training_scorer.Trainer, "validate", noted)
        facts = train(folder, tmp_path / "scorer.safetensors", replace(self.training, best_by=by))
        values = [sum(figures[by]) / 3 for figures, _ in seen]
        best = values.index(max(values) if by == "accuracy" else min(values))
        assert len(seen) == 6 and best < 5, "the last epoch is the best: the test shows nothing"
        saved = load_file(tmp_path / "scorer.safetensors")
        assert all(torch.equal(saved[name], tensor) for name, tensor in seen[best][1].items())
        assert not all(torch.equal(saved[name], tensor) for name, tensor in seen[-1][1].items())
        assert facts["validation"] == seen[best][0] == read_facts(tmp_path / "scorer.safetensors")["validation"]
        assert facts["best_step"] == math.ceil((best + 1) * facts["pairs"] / 8)

    def test_a_killed_run_keeps_it_too(self, folder, tmp_path, monkeypatch, every_step):
        """Killed before, at and after the best epoch."""
        whole, out = tmp_path / "whole.safetensors", tmp_path / "scorer.safetensors"
        assert wait_for(start_child(lambda: train(folder, whole, self.training))) == 0
        for step in (5, 8, 11):
            killed = start_child(lambda step=step: interrupt(monkeypatch, folder, out, step, self.training))
            assert wait_for(killed) == 0
        assert wait_for(start_child(lambda: train(folder, out, self.training))) == 0
        assert differing(out, whole) == []
        assert read_facts(out)["best_step"] == read_facts(whole)["best_step"] < read_facts(whole)["step"]
        assert read_facts(out)["validation"] == read_facts(whole)["validation"]

    def test_the_report_judges_the_pairs_it_was_chosen_by(self, folder, tmp_path):
        facts, out = train(folder, tmp_path / "scorer.safetensors", self.training), tmp_path / "scorer.safetensors"
        maps = (TokenMaps.open(folder / "real"), TokenMaps.open(folder / "generated"))
        report = judge(Scorer.from_pretrained(out), "a", read_facts(out), *maps, maker(), 0)
        assert report["pairs"] == facts["held_out"] and report["pairs_are"] == "held out of the scorer's training"
        assert [row["accuracy"] for row in report["scales"]] == pytest.approx(facts["validation"]["accuracy"])
