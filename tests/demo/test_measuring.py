"""What the demo's digits are measured by: the classifier's features, and sets of real digits."""

import pytest
import torch

from varkern.demo import digits, measuring, run
from varkern.demo.train import load_classifier


class TestMeasuring:
    def test_features_are_the_classifiers(self):
        images = measuring.RealDigits(30, 4).images
        extracted = measuring.extractor(run.WEIGHTS, torch.device("cpu"))(images)
        classifier = load_classifier(run.WEIGHTS)
        as_floats = images.float() / 127.5 - 1
        assert torch.equal(extracted.features, classifier.features(as_floats))
        assert torch.equal(extracted.logits, classifier(as_floats))
        maps = classifier.body[:8](as_floats.mean(1, keepdim=True))
        assert maps.shape == (30, 64, 6, 6)
        # As the published suite flattens its own: rows, columns, channels.
        assert extracted.spatial.shape == (30, 252) and extracted.spatial[3, 7 * (6 * 2 + 5) + 4] == maps[3, 4, 2, 5]

    def test_other_sizes_are_refused(self):
        with pytest.raises(ValueError, match="24x24 pixels for features demo, got 30x24"):
            measuring.extractor(run.WEIGHTS, torch.device("cpu"))(torch.zeros(1, 3, 24, 30, dtype=torch.uint8))

    def test_real_digits(self):
        real = measuring.RealDigits(25, 7)
        images, labels = digits.real_batch(25, torch.Generator().manual_seed(7))
        assert torch.cat(list(real.batches(10))).equal(((images + 1) * 127.5).round().byte())
        assert real.labels.equal(labels) and len(real) == 25 and real.size == (24, 24)
