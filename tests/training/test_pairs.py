"""Pairs of a real and a generated image: one class, every real image once an epoch, and a fixed part held out."""

import math
from collections import Counter

import numpy as np
import pytest
import torch

from varkern.training.pairs import fingerprint, make_pairs, random_order, random_words, select_held_out

from .small import SIDES, random_tokens, small_datasets, write_maps


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    return small_datasets(tmp_path_factory.mktemp("maps"))


@pytest.fixture
def pairs(datasets):
    return make_pairs(*datasets, validation=0.2, seed=3)


def drawn(part, epoch):
    """Places of real and generated images in one epoch, in its order."""
    return part.examples(epoch * len(part), (epoch + 1) * len(part))


class TestSplit:
    def test_nothing_is_in_both_parts(self, pairs, datasets):
        for name, maps in zip(("real", "generated"), datasets, strict=True):
            training, validation = (set(getattr(part, name).tolist()) for part in pairs[:2])
            assert not training & validation and training | validation == set(range(len(maps)))
        assert pairs.left_out == 0

    @pytest.mark.parametrize("share", [0.0, 0.01, 0.2, 0.5, 0.99])
    def test_every_class_gives_its_share_rounded_up_but_never_all(self, share):
        labels = np.repeat([4, 0, 2, 7], [1, 2, 10, 33])
        mask = select_held_out(labels, share, 0, 0)
        for label, count in Counter(labels.tolist()).items():
            assert mask[labels == label].sum() == min(math.ceil(share * count), count - 1)

    def test_a_function_of_labels_and_seed_alone(self, datasets):
        first, again, other = (make_pairs(*datasets, 0.2, seed).validation.real.tolist() for seed in (3, 3, 4))
        assert first == again and first != other

    def test_every_image_is_held_out_equally_often(self):
        labels = np.zeros(20, np.int64)
        times = sum(select_held_out(labels, 0.25, seed, 0).astype(int) for seed in range(400))
        # Binomial(400, 1/4): 7 standard deviations are 60; over 20 images a false alarm has probability below 1e-8.
        assert abs(times - 100).max() < 60

    def test_no_validation(self, datasets):
        pairs = make_pairs(*datasets, 0.0, 3)
        assert len(pairs.validation) == 0 and len(pairs.training) == len(datasets[0])
        assert list(pairs.validation.fixed_batches(4)) == []


class TestOrder:
    @pytest.mark.parametrize("count", [0, 1, 2, 1000])
    def test_a_permutation(self, count):
        assert sorted(random_order(1, count, 0, 0).tolist()) == list(range(count))

    def test_another_for_every_seed_epoch_and_stream(self):
        orders = {
            tuple(random_order(*key).tolist()) for key in [(0, 50, 0, 0), (1, 50, 0, 0), (0, 50, 1, 0), (0, 50, 0, 1)]
        }
        assert len(orders) == 4

    def test_places_are_uniform(self):
        """Where each of 8 images stands in 400 orders: a chi-square of 56 cells and 49 degrees of freedom."""
        places = np.zeros((8, 8))
        for epoch in range(400):
            places[np.arange(8), random_order(9, 8, epoch, 0)] += 1
        # The 1 - 1e-7 quantile of chi-square with 49 degrees of freedom is 114.
        assert ((places - 50) ** 2 / 50).sum() < 114

    def test_words_are_philox(self):
        from varkern.ops.philox import philox

        low, high = random_words(-7, 3, 5, 17)
        for place in range(3):
            words = philox(-7 & 0xFFFFFFFF, -7 >> 32 & 0xFFFFFFFF, place, 0, 5, 17)
            assert (low[place], high[place]) == words[:2]


class TestEpoch:
    def test_every_real_image_once(self, pairs):
        part = pairs.training
        for epoch in (0, 1, 7):
            real, _ = drawn(part, epoch)
            assert sorted(real.tolist()) == part.real.tolist()
        assert drawn(part, 0)[0].tolist() != drawn(part, 1)[0].tolist()

    def test_partners_are_of_the_class_and_of_the_part(self, pairs, datasets):
        for part in pairs[:2]:
            real, generated = (np.concatenate(side) for side in zip(*(drawn(part, e) for e in range(30)), strict=True))
            assert (datasets[0].labels[real] == datasets[1].labels[generated]).all()
            # 30 epochs: an image of at most 11 of its class is missed with probability below 1e-7 by 12 draws an epoch.
            assert set(generated.tolist()) == set(part.generated.tolist())

    def test_partners_are_drawn_anew(self, pairs):
        part = pairs.training
        partners = [dict(zip(*map(np.ndarray.tolist, drawn(part, epoch)), strict=True)) for epoch in range(2)]
        same = sum(partners[0][real] == partners[1][real] for real in partners[0])
        assert same < len(part) / 2

    def test_epochs_follow_without_a_gap(self, pairs):
        part, together = pairs.training, []
        for step in range(2 * len(part)):
            together += part.examples(7 * step, 7 * step + 7)[0].tolist()
        epochs = [together[i : i + len(part)] for i in range(0, len(together), len(part))]
        assert all(sorted(epoch) == part.real.tolist() for epoch in epochs)

    def test_a_batch_may_be_longer_than_an_epoch(self, pairs):
        part = pairs.training
        real, _ = part.examples(0, 3 * len(part))
        assert (np.bincount(real, minlength=50)[part.real] == 3).all()

    def test_history_does_not_matter(self, datasets):
        first, second = (make_pairs(*datasets, 0.2, 3).training for _ in range(2))
        for number in (500, 20, 300):
            first.examples(number, number + 4)
        for side in zip(first.examples(60, 90), second.examples(60, 90), strict=True):
            assert np.array_equal(*side)

    def test_ranks_share_a_batch(self, pairs, datasets):
        steps = range(2, 9)
        whole = list(pairs.training.batches(steps, 12))
        shares = zip(*(pairs.training.batches(steps, 12, rank, 3) for rank in range(3)), strict=True)
        for step, batch, parts in zip(steps, whole, shares, strict=True):
            real, _ = pairs.training.examples(12 * step, 12 * step + 12)
            assert torch.equal(batch.real, datasets[0].gather(real))
            for i, wanted in enumerate(batch):
                assert torch.equal(torch.cat([part[i] for part in parts]), wanted)

    def test_a_batch_holds_what_the_datasets_hold(self, pairs, datasets):
        real, generated = pairs.training.examples(10, 20)
        (batch,) = pairs.training.batches(range(1, 2), 10)
        assert torch.equal(batch.real, datasets[0].gather(real)) and batch.real.dtype == torch.int64
        assert torch.equal(batch.generated, datasets[1].gather(generated))
        assert batch.labels.tolist() == datasets[0].labels[real].tolist()

    @pytest.mark.parametrize("ranks", [1, 2, 3])
    def test_fixed_batches_pass_every_image_once(self, pairs, ranks):
        part = pairs.validation
        found = [batch for rank in range(ranks) for batch in part.fixed_batches(2, rank, ranks)]
        again = [batch for batch in part.fixed_batches(100)]
        assert sorted(torch.cat([b.real for b in found]).tolist()) == sorted(again[0].real.tolist())
        together = {
            (tuple(r), tuple(g)) for b in found for r, g in zip(b.real.tolist(), b.generated.tolist(), strict=True)
        }
        assert together == set(
            zip(map(tuple, again[0].real.tolist()), map(tuple, again[0].generated.tolist()), strict=True)
        )
        assert len(again) == 1 and len(again[0].labels) == len(part)


class TestBadDatasets:
    def test_no_shared_class(self, tmp_path):
        real = write_maps(tmp_path / "real", [0, 0, 1], random_tokens(3, 0))
        generated = write_maps(tmp_path / "generated", [2, 2], random_tokens(2, 0))
        with pytest.raises(ValueError, match=r"share a class, got 2 classes \(0, 1\) and 1 classes \(2\)"):
            make_pairs(real, generated, 0.0, 0)

    def test_classes_without_a_partner_are_left_out_and_counted(self, tmp_path):
        real = write_maps(tmp_path / "real", [0, 0, 1, 2, 2], random_tokens(5, 0))
        generated = write_maps(tmp_path / "generated", [2, 0, 2], random_tokens(3, 0))
        pairs = make_pairs(real, generated, 0.0, 0)
        assert pairs.training.real.tolist() == [0, 1, 3, 4] and pairs.left_out == 1
        # Class 0 has one generated image, which is trained with, so that its held-out real image has no partner.
        pairs = make_pairs(real, generated, 0.5, 0)
        assert len(pairs.training) == 2 and len(pairs.validation) == 1 and pairs.left_out == 2

    @pytest.mark.parametrize(
        "changes, length, message",
        [
            ({"patch_nums": (1, 4, 2)}, 21, r"same patch_nums, got \(1, 2, 4\) and \(1, 4, 2\)"),
            ({"vocabulary": 65}, 21, "same vocabulary, got 64 and 65"),
            ({"num_classes": 4}, 21, "same num_classes, got 3 and 4"),
        ],
        ids=["scale schedule", "vocabulary", "classes"],
    )
    def test_datasets_that_do_not_fit(self, changes, length, message, tmp_path):
        real = write_maps(tmp_path / "real", [0], random_tokens(1, 0))
        generated = write_maps(tmp_path / "generated", [0], random_tokens(1, 0, length=length), **changes)
        with pytest.raises(ValueError, match=message):
            make_pairs(real, generated, 0.0, 0)

    def test_empty_dataset(self, datasets, tmp_path, monkeypatch):
        empty = write_maps(tmp_path / "empty", [0], random_tokens(1, 0))
        empty.labels = empty.labels[:0]
        for maps, name in (((empty, datasets[1]), "real"), ((datasets[0], empty), "generated")):
            with pytest.raises(ValueError, match=rf"{name} must hold token maps, got none in .*empty"):
                make_pairs(*maps, 0.0, 0)

    def test_fingerprint_tells_datasets_apart(self, datasets, tmp_path):
        assert SIDES == datasets[0].manifest.patch_nums
        prints = {fingerprint(maps) for maps in datasets}
        tokens = random_tokens(50, 1, 32)
        tokens[17, 3] += 1
        prints.add(fingerprint(write_maps(tmp_path / "changed", torch.arange(50) % 3, tokens)))
        prints.add(fingerprint(write_maps(tmp_path / "same", torch.arange(50) % 3, random_tokens(50, 1, 32))))
        assert len(prints) == 3
