"""Several searches in one generation: who has which scale, and that each does there what it does alone."""

import copy

import pytest
import torch

from tests.helpers import caches_closed, idle, small_scorer, small_var
from varkern import BestOfM, Combined, DensitySearch, generate, patch, patched, unpatch
from varkern.search import as_search

LABELS = torch.tensor([3, 0, 5])


def mean_feature(labels, features, scale):
    return features.mean((2, 3, 4))


def density(scales=1, **options):
    return DensitySearch(12, 4, 1.5, scales=scales, min_distance=0.5, **options)


def drawn(search, seeds=0, labels=LABELS):
    return generate(small_var(), labels, seeds=seeds, search=search, top_k=30)


def equal(ones, others):
    return len(ones) == len(others) and all(torch.equal(a, b) for a, b in zip(ones, others, strict=True))


def counts(search):
    return [search.num_candidates(k, 5) for k in range(5)]


def test_who_has_which_scale():
    best = BestOfM(mean_feature, m=4)
    assert counts(Combined(density(), best)) == [1, 12, 4, 4, 4]
    assert counts(Combined(best, density())) == [1, 4, 4, 4, 4]
    assert counts(Combined(density((0, 3)), best)) == [12, 4, 4, 12, 4]
    assert counts(Combined(DensitySearch(1), best)) == [1, 4, 4, 4, 4]  # one candidate: it wants no scale
    assert counts(Combined(density(4), density(2), BestOfM(mean_feature, m=(3, 1, 5, 1, 6)))) == [3, 1, 12, 1, 12]
    assert counts(Combined(BestOfM(mean_feature, m=2), best)) == [1, 2, 2, 2, 2]  # two candidates are a search
    assert counts(Combined()) == [1] * 5


@pytest.mark.parametrize("strategy", ["hybrid", "top", "random", "small", "rank"])
def test_density_then_scores(strategy):
    """Up to the density's scale all is as under it alone; after it the highest score is kept."""
    alone = drawn(density(strategy=strategy))
    told = drawn([density(strategy=strategy), BestOfM(mean_feature, m=4)])
    assert equal(told.tokens[:2], alone.tokens[:2]) and torch.equal(told.scores[1], alone.scores[1])
    assert [None if s is None else s.shape[1] for s in told.scores] == [None, 12, 4, 4, 4]
    for scores, choice in zip(told.scores[2:], told.choices[2:], strict=True):
        assert torch.equal(choice, scores.argmax(-1))
    assert not torch.equal(told.tokens[2], alone.tokens[2])


def test_scores_then_density():
    """Up to the density's scale all is as under best-of-M alone; there, the candidates' densities are the scores."""
    best = BestOfM(mean_feature, m=4, first_scale=0, last_scale=2)
    alone, told = drawn(best), drawn((best, density((3, 4))))
    assert equal(told.tokens[:3], alone.tokens[:3]) and equal(told.scores[:3], alone.scores[:3])
    # Alone, the third scale draws one candidate: the first of those that the density search is offered.
    seen = drawn((best, First(12, scales=3)))
    assert equal(seen.tokens[:4], alone.tokens[:4])
    assert [s.shape[1] for s in told.scores] == [4, 4, 4, 12, 12]


class First(DensitySearch):
    """Always keeps the first candidate."""

    def choose(self, candidates):
        choice = super().choose(candidates)
        return choice._replace(index=torch.zeros_like(choice.index))


def test_a_search_that_gets_no_scale_changes_nothing():
    best = BestOfM(mean_feature, m=4)
    alone = drawn(best)
    for search in ([best], [best, density(1)], [best, density((2, 4))], [DensitySearch(1), best]):
        assert torch.equal(drawn(search).images, alone.images)
    assert torch.equal(drawn([]).images, drawn(None).images)


def test_images_depend_on_their_own_seed_alone():
    search, seeds = [density(), BestOfM(mean_feature, m=4, pick="resample")], torch.arange(70, 73)
    together = drawn(search, seeds)
    for image in range(3):
        part = slice(image, image + 1)
        alone = drawn(search, seeds[part], LABELS[part])
        assert equal([tokens[part] for tokens in together.tokens], alone.tokens)


def test_candidates_nest():
    """After the same density search, the candidates of M=4 are the first of M=8."""
    few, many = (drawn([density(), BestOfM(mean_feature, m=m)]) for m in (4, 8))
    assert equal(few.tokens[:2], many.tokens[:2])
    torch.testing.assert_close(many.scores[2][:, :4], few.scores[2])


def test_through_patch():
    model = small_var()
    before, described = dict(vars(model)), repr(model)
    plain = model.autoregressive_infer_cfg(3, LABELS, g_seed=4)
    searches = [density(), BestOfM(mean_feature, m=4)]
    assert patch(model, searches) is model
    images = model.autoregressive_infer_cfg(3, LABELS, g_seed=4)
    assert torch.equal(images, generate(small_var(), LABELS, seeds=4, search=Combined(*searches)).images)
    assert not torch.equal(images, plain) and caches_closed(model)
    assert repr(model) == described and f"search=Combined({searches[0]}, {searches[1]})" in repr(
        model.autoregressive_infer_cfg
    )
    copied = copy.deepcopy(model)
    for stripped in (unpatch(model), copied):
        assert torch.equal(stripped.autoregressive_infer_cfg(3, LABELS, g_seed=4), plain)
    assert vars(model).keys() == before.keys()


def test_patched_takes_several():
    model = small_var()
    plain = model.autoregressive_infer_cfg(3, LABELS, g_seed=4)
    with patched(model, (density(), BestOfM(mean_feature, m=4))):
        assert not torch.equal(model.autoregressive_infer_cfg(3, LABELS, g_seed=4), plain)
    assert torch.equal(model.autoregressive_infer_cfg(3, LABELS, g_seed=4), plain)


def test_repr():
    assert repr(Combined(density(), BestOfM(mean_feature, m=4))) == (
        "Combined(DensitySearch(n=12, representatives=4, alpha=1.5, scales=(1,), strategy='hybrid', "
        "metric='euclidean', per='position', bandwidth='image', min_distance=0.5, threshold='released'), "
        "BestOfM(mean_feature, m=4, first_scale=1, last_scale=None, pick='best'))"
    )


def test_as_search():
    best = BestOfM(mean_feature)
    assert as_search(best) is best and as_search(None) is None
    assert as_search([best, density()]).searches[0] is best
    assert as_search(Combined(Combined(density()), best)).num_candidates(1, 5) == 12


@pytest.mark.parametrize(
    "wrong, message",
    [
        ([DensitySearch(), 3], "searches must be searches such as varkern.BestOfM.*got int"),
        ([None, DensitySearch()], "searches must be searches .*got NoneType"),
        ([small_scorer()], "searches must be searches .*got Scorer"),
        ([[DensitySearch()]], "searches must be searches .*got list"),
        ([DensitySearch, BestOfM(mean_feature)], "searches must be searches .*got the class DensitySearch"),
        (DensitySearch, "search must be a search .*several in a list.*got the class DensitySearch"),
        (small_scorer(), "search must be a search .*got Scorer"),
        (iter([DensitySearch()]), "search must be a search .*got list_iterator"),
        ({1: DensitySearch()}, "search must be a search .*got dict"),
    ],
    ids=["int", "None", "scorer", "nested", "class in a list", "class", "alone", "iterator", "dict"],
)
def test_what_is_no_search_is_refused_before_any_work(wrong, message):
    model = small_var()
    with idle(model):
        for call in (lambda: patch(model, wrong), lambda: generate(model, LABELS, search=wrong)):
            with pytest.raises(TypeError, match=message):
                call()
    assert "autoregressive_infer_cfg" not in vars(model)


@pytest.mark.parametrize(
    "searches, labels, message",
    [
        ([density(), BestOfM(mean_feature, m=(1, 2))], LABELS, "m must have one number for each of 5 scales, got 2"),
        ([density(), BestOfM(small_scorer(size=8))], LABELS, "scorer was made for size=8"),
        ([BestOfM(mean_feature), density(7)], LABELS, "scales must be < 5"),
        ([density(), BestOfM(small_scorer())], -1, "must be in 0..6, the scorer's classes, got 7"),
    ],
    ids=["m", "scorer", "scales", "labels"],
)
def test_each_search_is_asked_whether_it_fits(searches, labels, message):
    model = small_var()
    with idle(model), pytest.raises(ValueError, match=message):
        generate(model, labels, search=searches)
