"""Search over paths in every family: what a path is, what follows it, and what is promised."""

import pytest
import torch

import varkern
from tests.path_helpers import (
    EVERY,
    IMAGES,
    SAMPLERS,
    Fixed,
    Given,
    brightness,
    seeds_of_paths,
    trees,
    weighed,
)
from tests.standins.cases import SEEDS, SHAPES, caches_closed, same, seeds_at
from varkern import BestOfM, BlockResample, PathSearch, patched
from varkern.ops import philox
from varkern.search import Resample

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
}
FOLLOWED = [  # every table for each family; for another shape of maps one that has copies and drops
    pytest.param(case, table, id=f"{name}, {what}")
    for name, case in SHAPES.items()
    for what, table in TABLES.items()
    if what == "copied" or name != "Infinity, patchify"
]


@pytest.mark.parametrize("case, table", FOLLOWED)
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
@SAMPLERS
def test_autocast(case, sampler):
    """A path is the same generation in bfloat16, and a search runs with either sampler."""
    model = case.build()
    search = PathSearch((2, 2, 2, 2, 1), {2: Fixed([1, 0]), 4: Fixed([0])}, brightness)
    with torch.autocast("cpu", torch.bfloat16):
        images, _ = trees(case, model, search, 3 if sampler == "multinomial" else SEEDS, sampler=sampler)
        with patched(model):
            wanted = case.images(case.call(model, seeds_of_paths(2)[:, 1]))
    assert images.shape == wanted.shape and images.dtype == wanted.dtype
    assert (sampler == "multinomial") or same(images, wanted)


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


def test_peak_memory_of_the_published_schedule():
    """The figure of docs/paths.md, by tokens: paths that draw a scale times all tokens up to it."""
    sides = (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64)
    search = PathSearch((8, 8, 6, 6, 6, 4, 2, 2, 2, 1, 1, 1, 1))
    totals = [sum(side**2 for side in sides[: scale + 1]) for scale in range(13)]
    assert max(search.num_paths(scale, 13) * total for scale, total in enumerate(totals)) == totals[-1]
