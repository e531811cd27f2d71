"""Search over paths of a toy of two scales of one token, against every probability enumerated: resampling by the exact
ratio of real maps to the model's is sequential Monte Carlo, and tends to the real maps as paths grow in number."""

import itertools

import numpy as np
import pytest
import torch

from tests.references import path_rules as reference
from tests.search.test_block_resample_exactly import p_value
from varkern import PathSearch
from varkern.generation import run
from varkern.ops import image_seeds
from varkern.search import Resample
from varkern.spec import Logits, ModelSpec, Request

FALSE_ALARM = 1e-7


class Toy:
    """A family of one model, which draws token r0 by ``first[r0]``, then r1 by ``second[r0, r1]``.

    The features of an image are the number of the tokens so far, so that a reward can look them up in a table.
    """

    name, has_classes = "toy", True

    def __init__(self, values=3, seed=0):
        generator = np.random.default_rng(seed)
        self.values = values
        self.first = generator.dirichlet(np.full(values, 2.0))
        self.second = generator.dirichlet(np.full(values, 2.0), values)
        self.model = self.first[:, None] * self.second  # [r0, r1]
        self.real = generator.dirichlet(np.full(values * values, 1.0)).reshape(values, values)
        # log p_real(r0) / p_model(r0), then log p_real(r0, r1) / p_model(r0, r1): what an exact scorer says
        self.ratios = [np.log(self.real.sum(1) / self.first), np.log(self.real / self.model).ravel()]

    def reward(self, condition, features, scale):
        return torch.from_numpy(self.ratios[scale])[features[:, 0, 0, 0].long()] + 5.0 * (scale + 1)

    def spec(self, model, request=None):
        return ModelSpec(1, (1, 1), (1, 1), 1, self.values, torch.device("cpu"))

    def device(self, model):
        return torch.device("cpu")

    def check(self, model, request): ...

    def caches(self, model):
        return []

    def repeat(self, labels, count):
        return labels.repeat_interleave(count)

    def open(self, model, labels, request, draws):
        return Session(self, len(labels))


class Session:
    codebook, code_scale = torch.zeros(1, 1), None

    def __init__(self, toy, batch):
        self.toy, self.number, self.closed = toy, torch.zeros(batch, dtype=torch.int64), False

    def logits(self, scale):
        table = torch.from_numpy(self.toy.first)[None] if scale == 0 else torch.from_numpy(self.toy.second)
        return Logits(table[self.number].log().unsqueeze(1), None, 0.0)

    def maps(self, scale, drawn):
        return drawn

    def commit(self, scale, tokens, logits, draws, hard):
        self.number = self.number * self.toy.values + tokens[:, 0]

    def keep(self, paths, finished=False):
        self.number = self.number[paths.flatten()]

    def features(self, scale):
        return self.number.double()[:, None, None, None]

    def decode(self):
        return self.number

    def close(self):
        self.closed = True


def numbers(toy, search, count, seed=0):
    """How often each image ``r0 * values + r1`` is kept, of ``count`` images."""
    found = np.zeros(toy.values**2, dtype=np.int64)
    for seeds in image_seeds(seed, count).split(20_000):
        request = Request(len(seeds), torch.zeros(len(seeds), dtype=torch.int64), seeds)
        made = run(toy, None, request, search, "philox")
        assert torch.equal(made.images, made.tokens[0][:, 0] * toy.values + made.tokens[1][:, 0])
        found += np.bincount(made.images.numpy(), minlength=toy.values**2)
    return found


def monte_carlo(toy, paths=4, middle=None):
    rule = Resample(1.0, "difference")
    reward = type("Exact", (), {"on_features": True, "__call__": lambda self, *given: toy.reward(*given)})()
    return PathSearch((middle or paths, 1), {0: rule, 1: rule}, reward)


def enumerated(toy, paths):
    """The exact distribution of the kept image: over all draws of all paths and all outcomes of both resamplings."""
    found, values = np.zeros(toy.values**2), range(toy.values)
    weights = [np.exp(ratio) for ratio in toy.ratios]
    for first in itertools.product(values, repeat=paths):
        chance = np.prod(toy.first[list(first)])
        for ancestors, share in reference.outcomes(weights[0][list(first)], paths).items():
            begun = [first[path] for path in ancestors]
            for second in itertools.product(values, repeat=paths):
                drawn = chance * share * np.prod([toy.second[a, b] for a, b in zip(begun, second, strict=True)])
                images = [a * toy.values + b for a, b in zip(begun, second, strict=True)]
                steps = np.array([weights[1][image] / weights[0][a] for image, a in zip(images, begun, strict=True)])
                for image, step in zip(images, steps / steps.sum(), strict=True):
                    found[image] += drawn * step
    return found


@pytest.mark.parametrize("values, paths", [(2, 1), (2, 2), (2, 3), (3, 2), (3, 3)])
def test_the_distribution_of_the_kept_image(values, paths):
    """40,000 images against the enumerated distribution; chance fails one of these in 10 million runs."""
    toy, count = Toy(values), 40_000
    wanted = enumerated(toy, paths)
    assert wanted.sum() == pytest.approx(1)
    counts = numbers(toy, monte_carlo(toy, paths), count)
    assert p_value(counts, wanted * count) > FALSE_ALARM / 5
    assert p_value(counts, toy.real.ravel() * count) < 1e-6  # few paths are not enough


def test_it_tends_to_real_maps_as_paths_grow():
    toy = Toy(2)
    distances = [np.abs(enumerated(toy, paths) - toy.real.ravel()).sum() / 2 for paths in (1, 2, 3, 4)]
    assert distances == sorted(distances, reverse=True)
    toy, count = Toy(3, seed=1), 4000
    counts = numbers(toy, monte_carlo(toy, 100), count)
    assert p_value(counts, toy.real.ravel() * count) > FALSE_ALARM
    assert p_value(counts, toy.model.ravel() * count) < 1e-12


def test_the_value_of_the_reward_is_not_the_right_potential():
    """Weighing by the whole ratio at both scales counts the first token twice; the enumeration would show it."""
    toy, count = Toy(3, seed=1), 4000
    search = monte_carlo(toy, 100)
    search.select = dict.fromkeys((0, 1), Resample(1.0, "value"))
    assert p_value(numbers(toy, search, count), toy.real.ravel() * count) < 1e-12
