"""Search over paths: what rules and rewards get, and what a generation returns."""

import itertools

import torch

from tests.helpers import small_scorer, small_var
from tests.path_helpers import (
    EVERY,
    IMAGES,
    LABELS,
    Fixed,
    Given,
    brightness,
    seeds_of_paths,
    trees,
    weighed,
)
from tests.standins.cases import CASES, same
from varkern import BestOfM, BlockResample, LogRatio, PathSearch, generate, patched
from varkern.ops import philox
from varkern.search import Choice

# ---- What rules and rewards get -----------------------------------------------------------------------------------


@EVERY
def test_what_a_reward_gets(case):
    """The images so far in [0, 1], the labels of all paths, and the scale; on features, the fused features so far."""
    model, calls, last = case.build(), [], []

    def reward(condition, images, scale):
        calls.append((condition, images.clone(), scale))
        return torch.arange(len(images)).float().view(IMAGES, -1).flip(1).flatten()

    def on_features(condition, features, scale):
        last.append(features.clone())
        return features.flatten(1)

    on_features.on_features = True
    select = {1: "top", 3: "cluster", 4: "top"}
    images, tree = trees(case, model, PathSearch((4, 3, 3, 2, 1), select, reward, on_features, images_at_once=3))
    assert [scale for _, _, scale in calls] == [1, 4]
    for condition, seen, scale in calls:
        paths = tree.tokens[scale].shape[1]
        assert same(condition, labels_of(case, paths)) and len(seen) == IMAGES * paths
        assert seen.dtype == torch.float32 and 0 <= seen.min() and seen.max() <= 1
    seen = calls[-1][1].view(IMAGES, 2, *calls[-1][1].shape[1:])[:, 0]
    if images.dtype == torch.uint8:
        seen = seen.permute(0, 2, 3, 1).flip(3) * 255
        assert (seen - images.float()).abs().max() <= 1
    else:
        wanted = images if case is CASES["VAR"] else (images + 1) / 2
        assert torch.allclose(seen, wanted.clamp(0, 1), atol=1e-5)
    assert tree.survivors[1].tolist() == [[0, 1, 2]] * IMAGES and tree.survivors[4].tolist() == [[0]] * IMAGES
    assert [None if r is None else tuple(r.shape) for r in tree.rewards] == [None, (5, 4), None, None, (5, 2)]
    assert last[0].shape == (IMAGES * 3, *case.size)


def labels_of(case, count):
    """The labels of ``count`` paths of each image, from the texts or classes of the images."""
    order = [place for place in range(IMAGES) for _ in range(count)]
    given = case.arguments(order)
    return given.get("label_B", given.get("label_B_or_BLT"))


@EVERY
def test_features_are_what_a_scorer_sees(case):
    """Those of the kept candidate, at each scale."""
    model, fused, seen = case.build(), {}, {}

    class First:
        def num_candidates(self, scale, num_scales):
            return 2

        def choose(self, candidates):
            fused[candidates.scale] = candidates.fuse(1, 2)[:, 0]
            assert same(candidates.labels, labels_of(case, 2))
            return Choice(torch.ones(2 * IMAGES, dtype=torch.int64), torch.zeros(2 * IMAGES, 2))

    def reward(condition, features, scale):
        seen[scale] = features.clone()
        return torch.zeros(len(features))

    reward.on_features = True
    trees(case, model, PathSearch(2, {scale: "resample" for scale in range(5)}, reward, search=First()))
    assert len(fused) == len(seen) == 5
    for scale, features in seen.items():
        assert torch.allclose(features, fused[scale], atol=1e-5)


def test_early_images_are_those_of_the_maps_so_far():
    model, seen = small_var(), {}

    def reward(condition, images, scale):
        seen[scale] = images
        return images.mean((1, 2, 3))

    search = PathSearch(2, {scale: "top" for scale in range(5)}, reward)
    tree = generate(model, LABELS, seeds=3, search=search).paths
    maps = [tokens.flatten(0, 1) for tokens in tree.tokens]
    partial = model.vae_proxy[0].idxBl_to_img(maps, same_shape=True, last_one=False)
    for scale, images in seen.items():
        assert torch.allclose(images, partial[scale].add(1).mul(0.5), atol=1e-5)


def test_a_rule_gets_earlier_rewards_along_each_path():
    rules = [Fixed([2, 0, 2]), Fixed([1, 1, 0]), Fixed([0, 2, 1]), Fixed([1])]
    numbers = itertools.count()

    def reward(condition, images, scale):
        return [float(next(numbers)) for _ in images]

    class Silent:
        """A rule that asks for no reward."""

        def __call__(self, paths):
            assert len(paths.history) == 2
            return torch.tensor([1, 2, 0]).expand(2, -1)

    select = {0: rules[0], 1: rules[1], 2: Silent(), 3: rules[2], 4: rules[3]}
    tree = generate(small_var(), LABELS[:2], seeds=3, search=PathSearch(3, select, reward)).paths
    first, second, third, last = (rule.offered[0] for rule in rules)
    assert first.history == () and first.rewards().tolist() == [[0, 1, 2], [3, 4, 5]]
    assert [h.tolist() for h in second.history] == [[[2, 0, 2], [5, 3, 5]]]
    assert [h.tolist() for h in third.history] == [[[0, 2, 0], [3, 5, 3]], [[7, 6, 7], [10, 9, 10]]]
    assert [h.tolist() for h in last.history][2] == [[12, 14, 13], [15, 17, 16]]
    assert tree.rewards[2] is None and tree.rewards[4].tolist() == [[18, 19, 20], [21, 22, 23]]
    assert [tuple(a.tolist()) for a in tree.ancestors()] == [(0, 0), (1, 1), (0, 0), (2, 2), (1, 1)]


# ---- What a generation returns -------------------------------------------------------------------------------------


def test_a_generation_is_that_of_the_path_of_its_image():
    model, scorer = small_var(), small_scorer()
    search = PathSearch((4, 4, 4, 2, 1), {3: "resample"}, LogRatio(scorer), search=BestOfM(weighed, m=3))
    result = generate(model, LABELS, seeds=5, search=search)
    tree, ancestors = result.paths, result.paths.ancestors()
    again = model.vae_proxy[0].idxBl_to_img(result.tokens, same_shape=True, last_one=True)
    assert torch.allclose(again.add(1).mul(0.5), result.images, atol=1e-5)
    for scale in range(5):
        assert torch.equal(result.tokens[scale], tree.tokens[scale][torch.arange(4), ancestors[scale]])
        assert scale == 0 or (result.scores[scale].shape == (4, 3) and result.choices[scale].shape == (4,))
    with patched(model, search):
        assert torch.equal(model.autoregressive_infer_cfg(B=4, label_B=LABELS, g_seed=5), result.images)
    assert result.scores[0] is None and len(result.effective_sample_size()) == 5
    tokens = generate(model, LABELS, seeds=5, search=search, decode=False)
    assert tokens.images is None and all(map(torch.equal, tokens.tokens, result.tokens))
    assert generate(model, LABELS, seeds=5).paths is None


def test_scores_and_steps_are_those_of_the_path():
    """The highest score of each scale is that of the kept map, fused anew."""
    model = small_var()
    for inner in (BestOfM(weighed, m=3), BlockResample(weighed, m=2, proposals=2, pick="best")):
        search = PathSearch((3, 3, 3, 3, 1), {2: "resample", 4: Fixed([2])}, LogRatio(weighed), search=inner)
        result = generate(model, LABELS, seeds=5, search=search)
        scored = []

        class Scoring(Given):
            def choose(self, candidates):
                maps = self.maps[candidates.scale].unsqueeze(1)
                scored.append(weighed(None, candidates.fuse_maps(maps), candidates.scale)[:, 0])  # noqa: B023
                return super().choose(candidates)

        generate(model, LABELS, seeds=5, search=Scoring(result.tokens))
        for scale in range(1, 5):
            assert torch.allclose(scored[scale], result.scores[scale].amax(1), rtol=1e-5)
        if isinstance(inner, BlockResample):
            assert [step is None or step.scores.shape[0] for step in result.steps] == [True, 4, 4, 4, 4]


def test_best_of_n_keeps_the_best_of_n_images():
    model = small_var()
    seeds = philox.image_seeds(9, 4)
    result = generate(model, LABELS, seeds=seeds, search=PathSearch.best_of_n(4, brightness))
    each = [generate(model, LABELS, seeds=s).images for s in seeds_of_paths(4, seeds).unbind(1)]
    means = torch.stack([images.mean((1, 2, 3)) for images in each], 1)
    assert torch.allclose(result.paths.rewards[4], means, atol=1e-5)
    best = means.argmax(1).tolist()
    wanted = torch.stack([each[path][image] for image, path in enumerate(best)])
    assert torch.equal(result.images, wanted) and len(set(best)) > 1
    same_one = generate(model, LABELS, seeds=seeds, search=PathSearch((4,) * 5, {4: "top"}, brightness))
    assert torch.equal(same_one.images, result.images)


def test_log_ratio_is_the_score_of_the_scorer():
    model, scorer = small_var(), small_scorer()
    result = generate(model, LABELS, seeds=9, search=PathSearch(2, {2: "top"}, LogRatio(scorer)))
    for scale in (2, 4):
        found = []

        class Scoring(Given):
            def choose(self, candidates):
                if candidates.scale == scale:  # noqa: B023
                    features = candidates.fuse_maps(self.maps[scale].unsqueeze(1))  # noqa: B023
                    found.append(scorer(candidates.labels, features, scale))  # noqa: B023
                return super().choose(candidates)

        for path in range(2):
            generate(model, LABELS, seeds=9, search=Scoring([t[:, path] for t in result.paths.tokens]))
        assert torch.allclose(result.paths.rewards[scale], torch.cat(found, 1), atol=1e-5)
    assert repr(LogRatio(scorer)) == "LogRatio(Scorer)"
