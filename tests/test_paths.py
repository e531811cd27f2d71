"""Search over paths in every family: what a path is, what follows it, and what a generation returns."""

import itertools

import pytest
import torch

import varkern
from tests.helpers import small_scorer, small_var
from tests.standins.cases import CASES, SEEDS, caches_closed, same, seeds_at
from varkern import BestOfM, BlockResample, Combined, LogRatio, PathSearch, generate, patched, searching
from varkern.ops import philox
from varkern.search import Choice, Resample

EVERY = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
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


# ---- What a path is ------------------------------------------------------------------------------------------------


@EVERY
def test_paths_are_separate_generations_bit_for_bit_where_nothing_is_dropped(case):
    """Path 0 is the image without paths; path j is the image of its own seed; and the kept one is what is returned."""
    model, count = case.build(), 3
    seeds = seeds_of_paths(count)
    assert torch.equal(seeds[:, 0], SEEDS)
    separate = []
    for path in range(count):
        search = PathSearch(1)
        separate.append(trees(case, model, search, seeds[:, path]))
        with patched(model):
            assert same(case.images(case.call(model, seeds[:, path])), separate[-1][0])
    for path in range(count):
        images, tree = trees(case, model, PathSearch(count, {4: Fixed([[path]] * IMAGES)}, brightness))
        assert same(images, separate[path][0])
        for scale, tokens in enumerate(tree.tokens):
            assert tokens.shape == (IMAGES, count, *case.shapes[scale])
            for other in range(count):
                assert torch.equal(tokens[:, other], separate[other][1].tokens[scale][:, 0]), f"scale {scale}"
    assert not torch.equal(tree.tokens[3][:, 0], tree.tokens[3][:, 1])


@EVERY
def test_paths_nest(case):
    model = case.build()
    found = {n: trees(case, model, PathSearch(n, None, brightness))[1] for n in (2, 4)}
    for two, four in zip(found[2].tokens, found[4].tokens, strict=True):
        assert torch.equal(four[:, :2], two)
    # Also where the smaller number of paths is what is left of the larger one.
    fewer = trees(case, model, PathSearch((4, 4, 2, 2, 1), {2: Fixed([0, 1]), 4: Fixed([0])}, brightness))[1]
    for two, left in zip(found[2].tokens, fewer.tokens, strict=True):
        assert torch.equal(left[:, :2], two)


TABLES = {
    "reordered": [[2, 0, 1], [1, 2, 0], [0, 2, 1], [2, 1, 0]],
    "dropped": [[0, 2], [1], [0], [0]],
    "copied": [[1, 1, 0], [2, 2, 2, 0], [3, 1], [0, 0, 1, 1]],
    "the same": [[0, 1, 2]] * 4,
}


@EVERY
@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_everything_follows_a_path(case, table):
    """Each path of each scale is what a generation of one image draws there after the path's earlier maps, with the
    seed of the path. A path that goes on keeps its seed, and its copies get others."""
    model = case.build()
    # The first scale is drawn by the first number of paths, so its rule keeps all of them, in another order.
    table = [[2, 0, 1], *table[:3]]
    paths, counts = [len(row) for row in table] + [1], [3, *(len(row) for row in table)]
    select = {scale: Fixed(row) for scale, row in enumerate(table)} | {4: Fixed([counts[4] - 1])}
    images, tree = trees(case, model, PathSearch(paths, select, brightness))
    assert caches_closed(case, model) and [t.shape[1] for t in tree.tokens] == counts[:5]
    seeds, prefixes = seeds_of_paths(3), [[] for _ in range(3)]
    for scale, tokens in enumerate(tree.tokens):
        for path in range(tokens.shape[1]):
            # A search that composes the maps leaves the draws of later scales as they are.
            given = Given(prefixes[path])
            _, alone = trees(case, model, PathSearch(1, search=given), seeds[:, path])
            assert torch.equal(alone.tokens[scale][:, 0], tokens[:, path]), f"scale {scale}, path {path}"
        rows = [*table, [counts[4] - 1]][scale]
        copies = torch.tensor([rows[:place].count(row) for place, row in enumerate(rows)]).expand(IMAGES, -1)
        seeds = philox.path_seeds(seeds[:, rows], copies, scale + 1)
        prefixes = [[*prefixes[row], tokens[:, row]] for row in rows]
    with patched(model, Given(prefixes[0])):
        assert same(case.images(case.call(model, SEEDS)), images)


@EVERY
def test_a_search_inside_each_path(case):
    model, count = case.build(), 2
    inner = BestOfM(weighed, m=3, pick="resample")
    seeds = seeds_of_paths(count)
    for path in range(count):
        search = PathSearch(count, {4: Fixed([path])}, brightness, search=inner)
        images, _ = trees(case, model, search)
        with patched(model, inner):
            assert same(case.images(case.call(model, seeds[:, path])), images)
    blocks = BlockResample(weighed, m=2, proposals=2)
    images, _ = trees(case, model, PathSearch(2, {4: Fixed([1])}, brightness, search=[blocks]))
    with patched(model, blocks):
        assert same(case.images(case.call(model, seeds[:, 1])), images)


@EVERY
def test_an_image_depends_on_its_own_seed_alone(case):
    model = case.build()

    def search():
        rules = {1: "cluster", 2: "resample", 3: Resample(30.0, "sum")}
        return PathSearch((4, 3, 3, 2, 1), rules, brightness, search=BestOfM(weighed, m=2))

    images, whole = trees(case, model, search())
    for places in ([4, 1], [2]):
        part_images, part = trees(case, model, search(), seeds_at(places), places)
        for scale in range(5):
            assert torch.equal(part.tokens[scale], whole.tokens[scale][places]), f"scale {scale}"
            assert torch.equal(part.survivors[scale], whole.survivors[scale][places])
        assert torch.allclose(
            part_images.float(), images[places].float(), atol=1.0 if images.dtype == torch.uint8 else 1e-4
        )
    assert torch.stack([s.sum(1) for s in whole.survivors]).unique(dim=1).shape[1] > 1


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


# ---- Promises ------------------------------------------------------------------------------------------------------


@EVERY
@SAMPLERS
def test_searches_over_paths_run(case, sampler):
    model, outcomes = case.build(), []
    published = case.call(model, 3)
    for search in (
        PathSearch.best_of_n(3, brightness),
        PathSearch((4, 2, 2, 3, 1), {1: "cluster", 3: "resample", 4: "top"}, brightness),
        PathSearch((2, 2, 4, 4, 1), {2: "resample"}, brightness, search=BestOfM(weighed, m=2)),
    ):
        with patched(model, search, sampler=sampler):
            outcomes.append(case.call(model, 3))
            assert same(case.call(model, 3), outcomes[-1])
    assert caches_closed(case, model) and same(case.call(model, 3), published)
    for images in map(case.images, outcomes):
        assert images.shape == case.images(published).shape and images.dtype == case.images(published).dtype


@EVERY
def test_one_path_is_no_search(case):
    """Bit for bit with the model's own draws, in whatever way one path is asked for."""
    model = case.build()
    published = case.call(model, 3)
    for search in (
        PathSearch(1),
        PathSearch((1,) * 5, {2: "resample"}, brightness),
        PathSearch.best_of_n(1, brightness),
    ):
        with patched(model, search, sampler="multinomial"):
            assert same(case.call(model, 3), published)


@EVERY
def test_options_of_every_family_hold_with_paths(case):
    """Temperatures, strengths and maps that are given per image follow its paths."""
    model = case.build()
    for name, options in case.published.items():
        if name in ("no images", "cut off", "a ramp of twelve scales") or "label_B" in options:
            continue
        count = len(options.get("infer_patch_nums", range(5)))
        seeds = seeds_of_paths(2)
        search = PathSearch((2,) * count, {1: Fixed([1, 0]), count - 1: Fixed([0])}, brightness)
        with patched(model, search):
            images = case.images(case.call(model, SEEDS, **options))
        with patched(model):
            wanted = case.images(case.call(model, seeds[:, 1], **options))
        if not same(images, wanted):
            assert (images.float() - wanted.float()).abs().max() < 1e-4, name


@EVERY
def test_an_exception_leaves_the_model_usable(case):
    model, calls = case.build(), []
    published = case.call(model, 3)

    def failing(condition, images, scale):
        calls.append(scale)
        raise KeyboardInterrupt

    def broken(paths):
        raise RuntimeError("the rule failed")

    for select, error in [
        ({1: "resample"}, KeyboardInterrupt),
        ({0: broken}, RuntimeError),
        ({4: broken}, RuntimeError),
    ]:
        with patched(model, PathSearch(3, select, failing)), pytest.raises(error):
            case.call(model, 3)
        assert caches_closed(case, model)
    assert same(case.call(model, 3), published)


@EVERY
def test_no_images(case):
    model = case.build()
    with patched(model, PathSearch((3, 2, 2, 2, 1), {1: "cluster", 4: "top"}, brightness)):
        assert case.images(case.call(model, 0, ())).shape[0] == 0


@EVERY
def test_memory_falls_as_paths_end(case):
    model, held = case.build(), []
    attentions = case.attentions(model)
    sizes, drawn = [[] for _ in attentions], []
    for shape in case.shapes:
        patch = getattr(case, "patch", 1)
        drawn.append(shape[0] // patch**2 + (drawn[-1] if drawn else 0))

    def note(paths):
        held.append([a.cached_k.shape[0] for a in attentions])
        for attention, filled in zip(attentions, sizes, strict=True):
            filled.append(attention.cached_k.numel() // attention.cached_k.shape[-1])

    class Noting(Fixed):
        def __call__(self, paths):
            note(paths)
            return super().__call__(paths)

    select = {0: Noting([0, 1, 2, 3]), 1: Noting([0, 1, 2, 3]), 2: Noting([3, 1]), 3: Noting([1, 0]), 4: Noting([0])}
    trees(case, model, PathSearch((4, 4, 2, 2, 1), select, brightness))
    assert held == [[n * 2 * IMAGES] * len(attentions) for n in (4, 4, 4, 2, 2)]
    for attention, filled in zip(attentions, sizes, strict=True):  # no more than what the paths have drawn
        assert filled == [
            n * 2 * IMAGES * attention.num_heads * length for n, length in zip((4, 4, 4, 2, 2), drawn, strict=True)
        ]


@EVERY
def test_nothing_is_copied_where_nothing_moves(case):
    model = case.build()
    family = varkern.families.recognise(model)
    request = family.request({**case.arguments(range(IMAGES)), "g_seed": SEEDS})
    draws = varkern.draws.make_draws("philox", request, torch.device("cpu"), None)
    session = family.open(model, request.labels, request, draws)
    attentions = case.attentions(model)

    def held():
        return [session.x, *(t for a in attentions for t in (a.cached_k, a.cached_v) if t is not None)]

    def places(tensors):
        return [tensor.data_ptr() for tensor in tensors]

    for scale in range(3):
        before = held()
        session.keep(torch.arange(IMAGES).view(IMAGES, 1))
        assert places(held()) == places(before)
        logits = session.logits(scale)
        kept = session.maps(scale, draws.tokens(logits, scale, 1))[:, 0]
        session.commit(scale, kept, logits, draws, hard=True)
    before = held()
    session.keep(torch.arange(IMAGES).flip(0).view(IMAGES, 1))
    assert len(before) > 2 and not set(places(held())) & set(places(before))
    session.close()


# ---- What is refused -----------------------------------------------------------------------------------------------

WRONG = {
    "no paths": (lambda: PathSearch(()), TypeError, r"paths must be an int or a sequence .*, got \(\)"),
    "a word": (lambda: PathSearch("8"), TypeError, "paths must be an int or a sequence .*, got '8'"),
    "zero": (lambda: PathSearch((4, 0)), ValueError, "paths must be >= 1, got 0"),
    "rule": (lambda: PathSearch(4, {2: "best"}), ValueError, r"select\[2\] must be one of .*, got 'best'"),
    "class": (lambda: PathSearch(4, {2: Resample}), TypeError, r"select\[2\] must be a rule such as"),
    "select": (lambda: PathSearch(4, ["top"]), TypeError, "select must be a dict from scales to rules"),
    "scale": (lambda: PathSearch(4, {-1: "top"}), ValueError, "select must have scales >= 0, counted from 0, got -1"),
    "no reward": (lambda: PathSearch(4, {2: "top"}), ValueError, "reward must be given for the rule Top.* of scale 2"),
    "reward": (lambda: PathSearch(4, reward=3), TypeError, "reward must be a callable object .*, got 3"),
    "features": (
        lambda: PathSearch(4, features="dino"),
        TypeError,
        "features must be a callable object .*, got 'dino'",
    ),
    "search": (lambda: PathSearch(4, search=brightness), TypeError, "search must be a search such as"),
    "inside": (lambda: PathSearch(4, search=PathSearch(2)), TypeError, "search must be a search inside each path"),
    "at once": (lambda: PathSearch(4, images_at_once=0), ValueError, "images_at_once must be an int >= 1, got 0"),
    "n": (lambda: PathSearch.best_of_n(0, brightness), ValueError, "n must be an int >= 1, got 0"),
    "joined": (lambda: Combined(PathSearch(2)), TypeError, "searches must not contain a PathSearch"),
    "list": (lambda: generate(small_var(), [0], search=[PathSearch(2)]), TypeError, "must not contain a PathSearch"),
}


@pytest.mark.parametrize("make, error, message", WRONG.values(), ids=WRONG)
def test_wrong_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


UNFIT = {
    "scales": (PathSearch((2,) * 6, None, brightness), "paths must have one number for each of 5 scales, got 6"),
    "select": (PathSearch(2, {5: "top"}, brightness), "select must have scales < 5, the model's scales, got 5"),
    "end": (
        PathSearch((4, 4, 4, 4, 2), None, brightness),
        "paths must end in 1 or in 4, the number of paths that draw",
    ),
    "no rule": (
        PathSearch((4, 4, 2, 2, 1), None, brightness),
        "select must have a rule for scale 2, after which paths changes from 4 to 2",
    ),
    "growth": (
        PathSearch((2, 2, 4, 4, 1), {2: "cluster"}, brightness),
        "paths must not grow after scale 2, whose rule Cluster.* copies no paths, got 2, 4",
    ),
    "no reward": (PathSearch(2), "reward must be given to keep one of 2 paths after the last scale, got none"),
    "inside": (
        PathSearch(2, reward=brightness, search=BestOfM(weighed, m=[2])),
        "m must have one number for each of 5",
    ),
    "scorer": (PathSearch(2, reward=LogRatio(small_scorer(channels=4))), "scorer was made for channels=4"),
}


@pytest.mark.parametrize("search, message", UNFIT.values(), ids=UNFIT)
def test_searches_that_do_not_fit_the_model(search, message):
    model = small_var()
    for call in (varkern.check, varkern.patch):
        with pytest.raises(ValueError, match=message):
            call(model, search)
    with pytest.raises(ValueError, match=message):
        generate(model, LABELS, search=search)


def test_labels_that_a_reward_does_not_know():
    search = PathSearch(2, reward=LogRatio(small_scorer()))
    with pytest.raises(ValueError, match=r"label .* must be in 0..6, the scorer's classes, got 7"):
        generate(small_var(), [7], search=search)


@pytest.mark.parametrize(
    "returned, message",
    [
        (lambda p: [0, 1], r"a rule of select must return an int64 tensor of shape \[4, 2\], got list"),
        (lambda p: torch.zeros(4, 3, dtype=torch.int64), r"of shape \[4, 2\], got torch.int64 of shape \[4, 3\]"),
        (lambda p: torch.zeros(4, 2), r"int64 tensor .*, got torch.float32"),
        (lambda p: torch.full((4, 2), 3), r"must return paths in 0..2, got \[\[3, 3\]"),
        (lambda p: torch.full((4, 2), -1), r"must return paths in 0..2, got \[\[-1, -1\]"),
    ],
)
def test_wrong_results_of_rules(returned, message):
    model = small_var()
    search = PathSearch((3, 2, 2, 2, 1), {1: returned, 4: "top"}, brightness)
    with pytest.raises((ValueError, TypeError), match=message):
        generate(model, LABELS, search=search)


@pytest.mark.parametrize("came", [torch.zeros(5), torch.zeros(12, 1), 0.5])
def test_wrong_results_of_rewards(came):
    search = PathSearch((3, 2, 2, 2, 1), {1: "top"}, lambda condition, images, scale: came)
    with pytest.raises(ValueError, match=r"reward must return values of shape \[12\], got "):
        generate(small_var(), LABELS, search=search)


def test_a_rule_that_asks_for_rewards_that_nobody_gives():
    search = PathSearch((3, 2, 2, 2, 1), {1: Fixed([0, 1]), 4: Fixed([0])})
    with pytest.raises(
        ValueError, match="reward must be given, because the rule of scale 1 asks for rewards, got none"
    ):
        generate(small_var(), LABELS, search=search)


def test_the_models_own_loop_has_no_paths():
    model, search = small_var(), PathSearch.best_of_n(2, brightness)
    with pytest.raises(ValueError, match="search must not be a PathSearch with loop='own'"):
        varkern.patch(model, search, loop="own")
    with (
        pytest.raises(ValueError, match="search must not be a PathSearch in the model's own loop"),
        searching(model, search),
    ):
        pass


def test_caches_that_are_unknown():
    model = small_var()

    class Attention:
        def kv_caching(self, enable): ...

    model.blocks[1].attn.__class__ = type("Plain", (torch.nn.Module,), {"kv_caching": Attention.kv_caching})
    del model.blocks[1].attn.cached_k
    with pytest.raises(
        varkern.UnsupportedModelError, match="needs KV caches with the attributes cached_k and cached_v"
    ):
        generate(model, LABELS, search=PathSearch.best_of_n(2, brightness))


def test_a_graph_is_not_captured():
    model, search = small_var(), PathSearch.best_of_n(2, brightness)
    wanted = generate(model, LABELS, seeds=0, search=search).images
    with patched(model, search, cuda_graph=True), pytest.warns(RuntimeWarning, match="Generating without a graph"):
        assert torch.equal(model.autoregressive_infer_cfg(B=4, label_B=LABELS, g_seed=0), wanted)


def test_how_it_is_shown():
    search = PathSearch((2, 1), {1: "resample"}, brightness, search=BestOfM(weighed, m=2))
    assert repr(search) == (
        "PathSearch(paths=(2, 1), select={1: Resample(strength=10.0, potential='value')}, reward=brightness, "
        "search=BestOfM(weighed, m=2, first_scale=1, last_scale=None, pick='best'))"
    )


def test_peak_memory_of_the_published_schedule():
    """The figure of docs/paths.md, by tokens: paths that draw a scale times all tokens up to it."""
    sides = (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64)
    search = PathSearch((8, 8, 6, 6, 6, 4, 2, 2, 2, 1, 1, 1, 1))
    totals = [sum(side**2 for side in sides[: scale + 1]) for scale in range(13)]
    assert max(search.num_paths(scale, 13) * total for scale, total in enumerate(totals)) == totals[-1]
