"""What is gathered of shares of a set, stored and merged, is what is gathered of the whole."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from varkern.metrics.features import Extracted
from varkern.metrics.gathering import Gathering

GENERATOR = torch.Generator().manual_seed(0)
FEATURES = torch.randn(130, 7, generator=GENERATOR) * torch.arange(1, 8) + 1000
LOGITS = torch.randn(130, 5, generator=GENERATOR)
SPATIAL = torch.randn(130, 3, generator=GENERATOR)


def extracted(start, stop, logits=True, spatial=True):
    rows = slice(start, stop)
    return Extracted(FEATURES[rows], LOGITS[rows] if logits else None, SPATIAL[rows] if spatial else None)


def gathered(start, stop, keep=40, batch=16, **parts):
    gathering = Gathering(keep)
    for first in range(start, stop, batch):
        gathering.add(extracted(first, min(first + batch, stop), **parts), first)
    return gathering


@pytest.mark.parametrize("cuts", [[0, 130], [0, 50, 130], [0, 1, 17, 17, 90, 130]])
@pytest.mark.parametrize("backwards", [False, True])
def test_merged_equals_whole(tmp_path, cuts, backwards):
    shares = [gathered(a, b) for a, b in pairwise(cuts)]
    for number, share in enumerate(shares):
        share.save(tmp_path / f"{number}.safetensors", {"number": number})
    loaded = [Gathering.load(tmp_path / f"{number}.safetensors") for number in range(len(shares))]
    assert [notes["number"] for _, notes in loaded] == list(range(len(shares)))
    whole = Gathering(40)
    for share, _ in reversed(loaded) if backwards else loaded:
        whole.merge(share)
    found, wanted = whole.summarize(), gathered(0, 130, batch=130).summarize()
    assert found.count == 130
    for moments, array in ((found.moments, FEATURES), (found.spatial, SPATIAL)):
        array = array.double().numpy()
        np.testing.assert_allclose(moments.mean, array.mean(0), rtol=1e-12)
        np.testing.assert_allclose(moments.covariance, np.cov(array, rowvar=False), rtol=1e-10, atol=1e-10)
    assert found.score == pytest.approx(wanted.score, rel=1e-12)
    assert torch.equal(found.features, FEATURES[:40])


def test_without_logits_and_spatial_features(tmp_path):
    gathered(0, 30, logits=False, spatial=False).save(tmp_path / "a.safetensors")
    measured = Gathering.load(tmp_path / "a.safetensors")[0].summarize()
    assert measured.score is None and measured.spatial is None and measured.moments is not None


def test_nothing(tmp_path):
    Gathering(5).save(tmp_path / "a.safetensors", {"alpha": None})
    gathering, notes = Gathering.load(tmp_path / "a.safetensors")
    measured = gathering.summarize()
    assert notes == {"alpha": None} and measured.count == 0
    assert measured.moments is None and measured.features is None and measured.score is None


def test_another_number_of_features():
    one, other = gathered(0, 20), Gathering()
    other.add(Extracted(FEATURES[:, :6], None), 20)
    with pytest.raises(ValueError, match="features must be 7 per image"):
        one.merge(other)


def test_nothing_is_kept_beyond_the_first():
    gathering = gathered(0, 130, keep=20)
    assert sum(len(part) for part in gathering.kept.values()) == 20
    assert not gathered(64, 130, keep=20).kept and not gathered(0, 130, keep=0).kept
