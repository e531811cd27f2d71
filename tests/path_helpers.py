"""What tests of searches over paths share."""

import pytest
import torch

import varkern
from tests.standins.cases import SEEDS, SHAPES
from varkern import patched
from varkern.ops import philox
from varkern.search import Choice

EVERY = pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES)
SAMPLERS = pytest.mark.parametrize("sampler", ["philox", "multinomial"])
LABELS = torch.tensor([3, 0, 5, 1])
IMAGES = len(SEEDS)


def brightness(condition, images, scale):
    return images.mean((1, 2, 3))


def weighed(labels, features, scale):
    return (features * torch.arange(1.0, features.shape[2] + 1).view(-1, 1, 1)).mean((2, 3, 4)) * 10


class Fixed:
    """A rule that selects these paths of every image; the next row of the table at each call."""

    def __init__(self, *table):
        self.table, self.offered = list(table), []

    def __call__(self, paths):
        self.offered.append(paths)
        row = torch.tensor(self.table[len(self.offered) - 1])
        return row.expand(len(paths.rewards()), -1) if row.dim() == 1 else row


class Given:
    """Keeps given maps ``[B, l]`` up to a scale, as a search that composes them, and draws freely after it."""

    def __init__(self, maps):
        self.maps = maps

    def num_candidates(self, scale, num_scales):
        return 2 if scale < len(self.maps) else 1

    def choose(self, candidates):
        scores = torch.zeros(candidates.tokens.shape[:2])
        return Choice(scores.argmax(1), scores, self.maps[candidates.scale])


def trees(case, model, search, seeds=SEEDS, places=range(IMAGES), sampler="philox", **options):
    """The images of a patched call and its tree of paths."""
    found = []
    of_images = varkern.path_loop.PathKeeper.of_images

    def remember(keeper, generation):
        found.append(of_images(keeper, generation))
        return found[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(varkern.path_loop.PathKeeper, "of_images", remember)
        with patched(model, search, sampler=sampler):
            images = case.images(case.call(model, seeds, places, **options))
    return images, found[-1].paths


def seeds_of_paths(count, seeds=SEEDS):
    copies = torch.arange(count).expand(len(seeds), -1)
    return philox.path_seeds(seeds.unsqueeze(1).expand(-1, count), copies, 0)
