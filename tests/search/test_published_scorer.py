"""A network of the published call as a scorer: what it is given, what comes back, and what is refused."""

import functools
import pickle

import pytest
import torch
from torch import nn

from tests.helpers import NUM_CLASSES, idle, small_scorer, small_var
from tests.standins.lsrs import map_network
from varkern import BestOfM, PublishedScorer, generate, patch, patched

LABELS = torch.tensor([3, 0, 5])


def by_map(x, class_labels, stage_label):
    """What the published call means: a score that every argument enters, each map on its own."""
    assert x.dim() == 4 and class_labels.shape == stage_label.shape == x.shape[:1]
    assert class_labels.dtype == stage_label.dtype == torch.int64
    return (x.sum((1, 2, 3)) + 100 * class_labels + 10_000 * stage_label).unsqueeze(1)


def test_every_candidate_has_its_own_label_and_scale():
    features = torch.randn(3, 4, 2, 5, 5, generator=torch.Generator().manual_seed(0)).double()
    scores = PublishedScorer(functools.partial(by_map))(LABELS, features, 7)
    assert scores.shape == (3, 4) and scores.dtype == torch.float64
    for image in range(3):
        for candidate in range(4):
            wanted = features[image, candidate].sum() + 100 * LABELS[image] + 70_000
            assert scores[image, candidate] == pytest.approx(wanted.item(), rel=1e-12)


@pytest.mark.parametrize("count", [1, 5])
def test_scores_are_those_of_our_own_call(count):
    """The same network, called in both ways."""
    scorer = small_scorer()
    wrapped = PublishedScorer(lambda x, classes, scales: scorer(classes, x.unsqueeze(1), scales.unsqueeze(1)))
    features = torch.randn(3, count, 8, 6, 6, generator=torch.Generator().manual_seed(1))
    for scale in range(5):
        assert torch.allclose(wrapped(LABELS, features, scale), scorer(LABELS, features, scale), rtol=0, atol=1e-6)
    assert wrapped(LABELS[:0], features[:0], 0).shape == (0, count)


def test_it_searches():
    model, network = small_var(), map_network()
    seen = []

    def scorer(labels, features, scale):  # map by map, through the network's own call
        seen.append(scale)
        rows = [
            [network(maps[i : i + 1], label.view(1), torch.tensor([scale])).item() for i in range(len(maps))]
            for label, maps in zip(labels, features, strict=True)
        ]
        return torch.tensor(rows)

    wanted = generate(model, LABELS, search=BestOfM(scorer, m=4), seeds=2)
    got = generate(model, LABELS, search=BestOfM(PublishedScorer(network), m=4), seeds=2)
    assert set(seen) == {1, 2, 3, 4}
    assert torch.equal(got.images, wanted.images)
    assert all(map(torch.equal, got.tokens, wanted.tokens))
    assert any((choice > 0).any() for choice in got.choices[1:])


def test_the_network_is_used_as_it_is():
    network = map_network().train()
    wrapped = PublishedScorer(network)
    assert wrapped.network is network and network.training
    assert [id(p) for p in wrapped.parameters()] == [id(p) for p in network.parameters()]
    twin = pickle.loads(pickle.dumps(wrapped))
    features = torch.randn(3, 2, 8, 6, 6)
    assert torch.equal(twin(LABELS, features, 1), wrapped(LABELS, features, 1))


def test_no_class_has_no_score():
    """A label beyond the network's table would read outside of it; a network without such a table takes any."""
    model, network = small_var(), map_network()
    with patched(model, BestOfM(PublishedScorer(network), m=2)):
        with idle(model), pytest.raises(ValueError, match=f"in 0..{NUM_CLASSES - 1}, the scorer's classes, got 7"):
            model.autoregressive_infer_cfg(2, -1, 0)
        assert model.autoregressive_infer_cfg(2, NUM_CLASSES - 1, 0).shape == (2, 3, 12, 12)
    with patched(model, BestOfM(PublishedScorer(by_map_of_any_name), m=2)):
        assert model.autoregressive_infer_cfg(2, -1, 0).shape == (2, 3, 12, 12)
    assert PublishedScorer(by_map_of_any_name).num_classes is None


def by_map_of_any_name(maps, classes, scales):
    return by_map(maps, classes, scales)


class TestRefused:
    @pytest.mark.parametrize("network", [map_network(), by_map], ids=["module", "function"])
    def test_a_network_that_is_not_wrapped(self, network):
        """Recognised by the names of its arguments: called as a scorer it would take labels for features."""
        with pytest.raises(TypeError, match=r"scorer must take \(labels, features, scale\), got .*PublishedScorer\("):
            BestOfM(network, m=2)

    @pytest.mark.parametrize(
        "network, message",
        [
            (None, "network must be a callable object, got None"),
            (nn.Linear, "network must be a callable object, got <class"),
            (PublishedScorer(by_map), "network must be the network itself, got one that is wrapped already"),
        ],
        ids=["nothing", "a class", "twice"],
    )
    def test_what_is_no_network(self, network, message):
        with pytest.raises(TypeError, match=message):
            PublishedScorer(network)

    @pytest.mark.parametrize(
        "scores, came",
        [(lambda x: x.sum((1, 2, 3)), r"\[6\]"), (lambda x: x.sum((2, 3)), r"\[6, 2\]"), (lambda x: 3.0, "float")],
        ids=["no last dimension", "several scores", "no tensor"],
    )
    def test_scores_of_another_shape(self, scores, came):
        wrapped = PublishedScorer(lambda maps, classes, scales: scores(maps))
        with pytest.raises(ValueError, match=rf"must return scores of shape \[6, 1\], got {came}"):
            wrapped(LABELS, torch.zeros(3, 2, 2, 4, 4), 0)

    def test_other_callables_are_not_taken_for_networks(self):
        for scorer in (small_scorer(), lambda labels, features, scale: features, lambda *given: given[1], max):
            BestOfM(scorer, m=2)


def test_patching_with_a_wrapped_network_never_waits(monkeypatch):
    from tests.test_waiting import arguments, far, no_waiting

    model, network = small_var(), map_network()
    where = far(model, model.vae_proxy[0], network)
    given = arguments(where)
    patch(model, BestOfM(PublishedScorer(network), m=3))
    if where.type == "cuda":
        model.autoregressive_infer_cfg(**given)
    with no_waiting(monkeypatch):
        model.autoregressive_infer_cfg(**given)
