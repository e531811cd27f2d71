"""Block resampling in generations of every family: what it composes, its promises, and what is refused."""

import copy
import math
import pickle
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from tests.helpers import TINY_SIDES, caches_closed, idle, relative_error, small_scorer, small_var
from tests.references import vqvae
from tests.standins.cases import CASES, SEEDS, SHAPES, same, seeds_at
from tests.test_chunks import assert_equal, counted
from tests.test_graphs import capture  # noqa: F401
from tests.test_waiting import arguments, far, no_waiting
from varkern import BestOfM, BlockResample, DensitySearch, check, generate, patch, patched
from varkern.ops import use_backend
from varkern.ops.philox import STEPS, uniforms
from varkern.search.block_resample import block_numbers, usual_block

EVERY = pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES)
LABELS = torch.tensor([3, 0, 5])
METHOD = "autoregressive_infer_cfg"


def weighed(labels, features, scale):
    """Every place of every channel has a different weight, so that only equal maps have equal scores."""
    weights = (
        torch.arange(1.0, math.prod(features.shape[2:]) + 1, device=features.device).cos().view(features.shape[2:])
    )
    return (features * weights).mean((2, 3, 4)) * 100


class Traced(BlockResample):
    """Remembers what it was offered, the composed maps with their features, its picks, what it kept and its score."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.offered, self.composed, self.picks, self.kept, self.final = [], [], [], [], []

    def choose(self, candidates):
        composed = []

        def fuse_maps(maps, **wanted):
            composed.append((maps, candidates.fuse_maps(maps, **wanted)))
            return composed[-1][1]

        for record, entry in ((self.offered, candidates), (self.composed, composed), (self.picks, [])):
            record.append(entry)
        self.kept.append(super().choose(replace(candidates, fuse_maps=fuse_maps)))
        if self.kept[-1].tokens is not None:
            self.final.append(self.scores(candidates, self.kept[-1].tokens.unsqueeze(1)))
        return self.kept[-1]

    def picked(self, scale, scores, uniforms):
        self.picks[-1].append(super().picked(scale, scores, uniforms))
        return self.picks[-1][-1]

    def keep(self, *given):
        found = super().keep(*given)
        self.picks[-1].append(found.index)
        return found


def in_positions(maps, grid):
    """Maps ``[n, l]`` or ``[n, l, d]`` with all entries of a position of the transformer together, ``[n, h, w, e]``."""
    (h, w), patch = grid, math.isqrt(maps.shape[1] // math.prod(grid))
    return maps.reshape(len(maps), h, patch, w, patch, -1).transpose(2, 3).flatten(3)


def edges(length, count, uniform):
    """The edges between blocks along one axis, by the description of the search."""
    inner = [math.ceil(i * length / count) for i in range(1, count)]
    reach = inner[0] // 2 if inner else 0
    moves = [
        move for move in range(-reach, reach + 1) if not inner or (inner[0] + move > 0 and inner[-1] + move < length)
    ]
    move = moves[int(float(uniform) * len(moves))]
    return [0, *(edge + move for edge in inner), length]


# ---- What is composed ----------------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("sweeps, blocks", [(1, None), (2, 2), (1, {1: 1, 2: 2, 3: 1, 4: 3, 6: 2})], ids=str)
def test_every_composed_map(case, sweeps, blocks):
    """Each is the map kept so far with one block of one fresh candidate; all blocks of a sweep cover the map once."""
    model, m, proposals = case.build(), 2, 3
    search = Traced(weighed, m, proposals, blocks, sweeps, first_scale=0)
    with patched(model, search):
        case.call(model, SEEDS)
    assert len(search.offered) == 5
    for candidates, composed, picks, choice in zip(
        search.offered, search.composed, search.picks, search.kept, strict=True
    ):
        grid, scale = candidates.grid, candidates.scale
        count = search.num_blocks(scale, grid)
        steps = count[0] * count[1]
        assert len(composed) == sweeps * steps == len(picks) - 1
        assert choice.scores.shape == (5, m + sweeps * steps * proposals)
        numbers = uniforms(SEEDS, proposals + 1, sweeps * (steps + 1), scale, STEPS)
        for image in range(5):
            tokens = in_positions(candidates.tokens[image], grid)
            kept, step = tokens[choice.index[image]], 0
            for sweep in range(sweeps):
                places = numbers[image, :2, sweep * (steps + 1)]
                rows, columns = (edges(n, c, u) for n, c, u in zip(grid, count, places, strict=True))
                for top, bottom in pairwise(rows):
                    for left, right in pairwise(columns):
                        wanted = kept.expand(proposals, -1, -1, -1).clone()
                        inside = (slice(None), slice(top, bottom), slice(left, right))
                        start = m + sweep * proposals
                        wanted[inside] = tokens[start : start + proposals][inside]
                        assert torch.equal(in_positions(composed[step][0][image], grid), wanted)
                        step += 1
                        pick = int(picks[step][image])
                        kept = kept if pick == 0 else wanted[pick - 1]
            assert torch.equal(in_positions(choice.tokens[image : image + 1], grid)[0], kept)
    assert not torch.equal(choice.tokens, candidates.tokens[torch.arange(5), choice.index])


@pytest.mark.parametrize("pick", ["resample", "best"])
def test_scores_and_what_they_decide(pick):
    """The scores told are those of the maps in their order, and each pick follows from them."""
    model, search = small_var(), Traced(weighed, 3, 4, pick=pick, temperature=0.5)
    told = generate(model, LABELS, seeds=0, search=search)
    for scale, choice in zip((1, 2, 3, 4), search.kept, strict=True):
        assert torch.equal(told.scores[scale], choice.scores) and torch.equal(told.choices[scale], choice.index)
        assert torch.equal(told.tokens[scale], choice.tokens)
        kept = choice.scores[:, :3].gather(1, choice.index[:, None])
        for part, picked in zip(choice.scores[:, 3:].split(4, 1), search.picks[scale - 1][1:], strict=True):
            of_all = torch.cat((kept, part), 1)
            if pick == "best":
                assert torch.equal(picked, of_all.argmax(1))
            kept = of_all.gather(1, picked[:, None])
        assert torch.allclose(search.final[scale - 1], kept, atol=1e-4)


def test_features_of_composed_maps_of_var_in_float64():
    model, search = small_var(), Traced(weighed, 2, 3, first_scale=0)
    told = generate(model, LABELS, seeds=0, search=search)
    weights, f_hat = vqvae.weights_of(model.vae_proxy[0]), 0.0
    codebook = weights["quantize.embedding.weight"]
    for scale in range(len(TINY_SIDES)):
        for maps, features in search.composed[scale]:
            for number in range(maps.shape[1]):
                whole = f_hat + vqvae.fused(weights, codebook[maps[:, number]], scale, TINY_SIDES)
                assert relative_error(features[:, number], whole) < 1e-5
        f_hat = f_hat + vqvae.fused(weights, codebook[told.tokens[scale]], scale, TINY_SIDES)


def test_features_of_composed_maps_of_flexvar_in_float64():
    case = CASES["FlexVAR"]
    model, search = case.build(), Traced(weighed, 2, 3, first_scale=0)
    with patched(model, search):
        case.call(model, SEEDS)
    codebook = F.normalize(case.vae.quantize.embedding.weight.double(), dim=-1)
    for candidates, composed in zip(search.offered, search.composed, strict=True):
        side = candidates.grid[0]
        matrix = torch.eye(6, dtype=torch.float64) if side == 6 else vqvae.bicubic_matrix(side, 6)
        for maps, features in composed:
            codes = codebook[maps].unflatten(2, (side, side)).flatten(0, 1).permute(0, 3, 1, 2)
            assert relative_error(features.flatten(0, 1), vqvae.resized(codes, matrix)) < 1e-5


@pytest.mark.parametrize("name", ["Infinity", "Infinity, patchify"])
def test_features_of_composed_maps_of_infinity_in_float64(name):
    case = CASES[name]
    model, search = case.build(), Traced(weighed, 2, 3, first_scale=0)
    with patched(model, search):
        case.call(model, SEEDS)
    width, f_hat = case.size[0], 0.0

    def features_of(maps, grid):
        codes = (2.0 * maps.double() - 1) / math.sqrt(width)
        codes = codes.unflatten(1, [case.patch * n for n in grid]).permute(0, 3, 1, 2)
        return F.interpolate(codes, size=case.size[1:], mode="bilinear", align_corners=False)

    for candidates, composed, choice in zip(search.offered, search.composed, search.kept, strict=True):
        for maps, features in composed:
            for number in range(maps.shape[1]):
                whole = f_hat + features_of(maps[:, number], candidates.grid)
                assert relative_error(features[:, number], whole) < 1e-5
        f_hat = f_hat + features_of(choice.tokens, candidates.grid)


# ---- Blocks --------------------------------------------------------------------------------------------------------


def test_about_sixteen_blocks():
    counts = {side: math.ceil(side / usual_block(side)) ** 2 for side in (*range(1, 17), 18, 20, 24, 32, 40, 48, 64)}
    assert [counts[side] for side in (1, 2, 3, 4, 5, 6)] == [1, 4, 4, 4, 9, 9]
    assert {counts[side] for side in (8, 10, 12, 13, 16, 18, 20, 24, 32, 40, 48, 64)} == {16}
    assert all(9 <= counts[side] <= 16 for side in range(5, 17))


@pytest.mark.parametrize("grid", [(1, 1), (2, 2), (3, 3), (7, 5), (4, 6), (13, 13), (16, 9)], ids=str)
@pytest.mark.parametrize("block", [1, 2, 3, 4, 50])
@pytest.mark.parametrize("patch", [1, 2])
def test_blocks_tile_the_map(grid, block, patch):
    """None is empty, each is a rectangle of at most 1.5 block sides, and each axis has every place for its edges."""
    count = tuple(math.ceil(n / block) for n in grid)
    extremes = torch.tensor([0.0, 1 - 2.0**-24, 0.5])
    drawn = torch.cat((torch.cartesian_prod(extremes, extremes), torch.rand(80, 2)))
    numbers = block_numbers(grid, count, drawn, patch).view(-1, patch * grid[0], patch * grid[1])
    for image, places in zip(numbers, drawn, strict=True):
        rows, columns = (edges(n, c, u) for n, c, u in zip(grid, count, places, strict=True))
        wanted = torch.full(image.shape, -1)
        for number in range(count[0] * count[1]):
            (top, bottom), (left, right) = (
                (axis[i], axis[i + 1]) for axis, i in ((rows, number // count[1]), (columns, number % count[1]))
            )
            assert 0 < bottom - top <= 1.5 * block + 0.5 and 0 < right - left <= 1.5 * block + 0.5
            wanted[patch * top : patch * bottom, patch * left : patch * right] = number
        assert torch.equal(image, wanted)
    most = 1 + 2 * (-(-grid[0] // count[0]) // 2) if count[0] > 1 else 1
    assert most - 1 <= numbers[:, :, 0].unique(dim=0).shape[0] <= most


def test_edges_differ_by_sweep_and_image():
    search = BlockResample(weighed, 2, 2, 4, sweeps=3)
    numbers = uniforms(torch.arange(50), 3, 3 * 17, 7, STEPS)
    places = [block_numbers((16, 16), (4, 4), numbers[:, :2, sweep * 17]) for sweep in range(3)]
    assert search.num_scored(7, (16, 16)) == 2 + 3 * 16 * 2
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert (places[first] != places[second]).any(1).float().mean() > 0.8
    assert places[0].unique(dim=0).shape[0] > 15


# ---- Promises ------------------------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("pick", ["resample", "best"])
@pytest.mark.parametrize("sampler", ["philox", "multinomial"])
def test_without_proposals_it_is_best_of_m(case, pick, sampler):
    model, found = case.build(), []
    for search in (BestOfM(weighed, 5, pick=pick), BlockResample(weighed, 5, proposals=0, pick=pick)):
        with patched(model, search, sampler=sampler):
            found.append(case.call(model, 3))
    assert same(*found)
    with patched(model, BlockResample(weighed, m=1, proposals=0, pick=pick), sampler=sampler):
        one = case.call(model, 3)
    with patched(model, sampler=sampler):
        assert same(case.call(model, 3), one) and not same(one, found[0])


@EVERY
def test_the_whole_maps_are_those_of_best_of_m(case):
    """Also the first choice among them, however many proposals and sweeps follow; and the first is what M=1 draws."""
    model, offered, indices = case.build(), [], []
    plain = Traced(weighed, 4, 0, first_scale=0, last_scale=0)
    for search in (plain, *(Traced(weighed, 4, *more, first_scale=0, last_scale=0) for more in ((2,), (5, 2, 2)))):
        with patched(model, search):
            case.call(model, SEEDS)
        offered.append(search.offered[0].tokens)
        indices.append(search.kept[0].index)
    assert [tokens.shape[1] for tokens in offered] == [4, 6, 14]
    assert all(torch.equal(offered[2][:, : tokens.shape[1]], tokens) for tokens in offered)
    assert all(torch.equal(index, indices[0]) for index in indices)


@EVERY
@pytest.mark.parametrize("pick", ["resample", "best"])
def test_an_image_depends_on_its_own_seed_alone(case, pick):
    model, kept = case.build(), {}
    for places in ((0, 1, 2, 3, 4), (4, 1), (2,)):
        search = Traced(weighed, 2, 3, sweeps=2, first_scale=0, pick=pick)
        with patched(model, search):
            case.call(model, seeds_at(places), places)
        kept[places] = [choice.tokens for choice in search.kept]
    whole = kept.pop((0, 1, 2, 3, 4))
    for places, tokens in kept.items():
        for scale, (part, all_tokens) in enumerate(zip(tokens, whole, strict=True)):
            assert torch.equal(part, all_tokens[list(places)]), f"places {places}, scale {scale}"


@EVERY
def test_seeds_and_loops(case):
    model, found = case.build(), {}
    for loop in ("fused", "own"):
        with patched(model, BlockResample(weighed, 2, 3, sweeps=2), loop=loop):
            found[loop] = case.images(case.call(model, 9)).float()
            assert torch.equal(case.images(case.call(model, 9)).float(), found[loop])
            assert not torch.equal(case.images(case.call(model, 10)).float(), found[loop])
    difference = (found["fused"] - found["own"]).abs()
    assert difference.max() <= (1 if difference.max() >= 1 else 2e-5)


@EVERY
@pytest.mark.parametrize("loop", ["fused", "own"])
def test_the_models_own_generator(case, loop):
    model, search, found = case.build(), Traced(weighed, 2, 3, sweeps=2), []
    with patched(model, search, sampler="multinomial", loop=loop):
        for seed in (3, 3, 4):
            torch.manual_seed(1)
            found.append(case.call(model, seed))
        assert same(found[0], found[1]) and not same(found[0], found[2])
    first, second = (choice.index for choice in search.kept[:2])
    assert case.images(found[0]).shape[0] == 5 and first.shape == second.shape == (5,)


@EVERY
def test_beside_another_search(case):
    """Density search has its scale, block resampling the others; each does there what it does alone."""
    model, search = case.build(), Traced(weighed, 2, 3)
    with patched(model, [DensitySearch(n=6, scales=(2,), min_distance=0), search]):
        case.call(model, SEEDS)
    assert [candidates.scale for candidates in search.offered] == [1, 3, 4]
    alone = Traced(weighed, 2, 3)
    with patched(model, alone):
        case.call(model, SEEDS)
    assert torch.equal(search.kept[0].tokens, alone.kept[0].tokens)


@EVERY
def test_no_images_and_exceptions(case):
    model = case.build()
    with patched(model, BlockResample(weighed, 2, 3)):
        assert case.images(case.call(model, 0, ())).shape[0] == 0
    calls = []

    def failing(labels, features, scale):
        calls.append(scale)
        if len(calls) == 4:
            raise RuntimeError("here")
        return weighed(labels, features, scale)

    with patched(model, BlockResample(failing, 2, 3)), pytest.raises(RuntimeError, match="here"):
        case.call(model, SEEDS)
    assert all(a.cached_k is None and not a.caching for a in case.attentions(model))


@pytest.mark.parametrize(
    "m, proposals, sweeps, pick",
    [(1, 1, 1, "resample"), (3, 4, 2, "resample"), (1, 4, 1, "best")],
    ids=str,
)
def test_chunks_and_graphs_change_nothing(m, proposals, sweeps, pick, device, quick_backend, capture):  # noqa: F811
    model, batch = small_var().to(device), len(SEEDS)
    model.vae_proxy[0].to(device)
    model.rng = torch.Generator(device)
    options = {"cfg": 2.0, "top_k": 30, "top_p": 0.9}
    labels = torch.tensor([3, 0, 5, 5, 2])
    with use_backend(quick_backend):
        search = BlockResample(counted, m, proposals, sweeps=sweeps, pick=pick)
        wanted = generate(model, labels, seeds=SEEDS, search=search, **options)
        for maps in (1, 2 * batch, 3 * batch + 1):
            search = BlockResample(counted, m, proposals, sweeps=sweeps, pick=pick, maps_at_once=maps)
            assert_equal(generate(model, labels, seeds=SEEDS, search=search, **options), wanted, f"{maps} at once")
        with patched(model, search, cuda_graph=True):
            call = getattr(model, METHOD)
            call(batch, labels.to(device), g_seed=SEEDS + 1, **options)
            captures = len(capture)
            assert torch.equal(call(batch, labels.to(device), g_seed=SEEDS, **options), wanted.images)
            assert len(capture) == captures == 1
            search.blocks = {2: 1, 3: 1, 4: 1, 6: 3}
            other = call(batch, labels.to(device), g_seed=SEEDS, **options)
            search.blocks[6] = 1
            again = call(batch, labels.to(device), g_seed=SEEDS, **options)
            assert len(capture) == 3 and not torch.equal(other, again)


def test_only_so_many_maps_exist_at_once():
    sizes = []

    def scorer(labels, features, scale):
        sizes.append(features.shape[0] * features.shape[1])
        return weighed(labels, features, scale)

    generate(small_var(), LABELS, seeds=0, search=BlockResample(scorer, 8, 8, maps_at_once=6))
    assert max(sizes) == 6 and sum(sizes) == 3 * sum((8 + 8 * blocks) for blocks in (4, 4, 4, 9))


def test_it_never_waits_for_the_device(monkeypatch):
    model, scorer = small_var(), small_scorer()
    where = far(model, model.vae_proxy[0], scorer)
    patch(model, BlockResample(scorer, 2, 3, maps_at_once=7, last_scale=2))
    given = arguments(where)
    if where.type == "cuda":
        model.autoregressive_infer_cfg(**given)
    with no_waiting(monkeypatch):
        assert model.autoregressive_infer_cfg(**given).shape == (3, 3, 12, 12)


def test_the_kernels_compose_the_same_maps(device):
    """Triton's kernels, on a GPU, interpreted or compiled, against the plain PyTorch forms on the CPU."""
    told = []
    for backend, where in (("torch", torch.device("cpu")), ("triton", device)):
        model = small_var((1, 3)).to(where)
        model.vae_proxy[0].to(where)
        model.rng = torch.Generator(where)
        search = BlockResample(weighed, 2, 2, first_scale=0)
        with use_backend(backend):
            found = generate(model, LABELS[:2], seeds=4, search=search)
        told.append(([tokens.cpu() for tokens in found.tokens], [scores.cpu() for scores in found.scores]))
    assert all(map(torch.equal, told[0][0], told[1][0]))
    for scores, wanted in zip(told[1][1], told[0][1], strict=True):
        assert torch.allclose(scores, wanted, atol=1e-3)


# ---- Settings and what is refused ----------------------------------------------------------------------------------


def test_settings():
    search = BlockResample(weighed, m=3, proposals=5, sweeps=2, first_scale=2, last_scale=3)
    assert [search.num_candidates(k, 5) for k in range(5)] == [1, 1, 13, 13, 1]
    asked = []

    def by_scale(scale, side):
        asked.append((scale, side))
        return scale

    search = BlockResample(weighed, 2, 1, by_scale)
    told = generate(small_var(), LABELS, seeds=0, search=search)
    assert [s.shape[1] for s in told.scores[1:]] == [2 + 4, 2 + 4, 2 + 4, 2 + 4]
    assert set(asked) == {(1, 2), (2, 3), (3, 4), (4, 6)}
    assert BlockResample(weighed, blocks=2).num_blocks(0, (3, 5)) == (2, 3)


def test_repr_and_copies():
    search = BlockResample(small_scorer(), 3, blocks={2: 1}, pick="best")
    text = (
        "BlockResample(Scorer, m=3, proposals=8, blocks={2: 1}, sweeps=1, first_scale=1, last_scale=None, pick='best')"
    )
    assert repr(search) == text == repr(copy.deepcopy(search)) == repr(pickle.loads(pickle.dumps(search)))
    assert repr(BlockResample(weighed)).endswith("pick='resample', temperature=1.0)")


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"scorer": 3}, TypeError, "scorer must be callable, got int"),
        ({"m": 0}, ValueError, "m must be an int >= 1, got 0"),
        ({"m": (1, 4)}, ValueError, r"m must be an int >= 1, got \(1, 4\)"),
        ({"m": True}, ValueError, "m must be an int >= 1, got True"),
        ({"proposals": -1}, ValueError, "proposals must be an int >= 0, got -1"),
        ({"proposals": 2.0}, ValueError, "proposals must be an int >= 0, got 2.0"),
        ({"sweeps": 0}, ValueError, "sweeps must be an int >= 1, got 0"),
        ({"blocks": 0}, ValueError, "blocks must be >= 1, got 0"),
        ({"blocks": 2.5}, TypeError, r"blocks must be an int, a dict, a function \(scale, side\) or None, got 2.5"),
        ({"blocks": "2"}, TypeError, r"blocks must be an int, .*got '2'"),
        ({"blocks": True}, TypeError, r"blocks must be an int, .*got True"),
        ({"blocks": {4: 0}}, ValueError, "blocks must give an int >= 1 for each side, got 0 for 4"),
        ({"blocks": {4: "a"}}, ValueError, "blocks must give an int >= 1 for each side, got 'a' for 4"),
        ({"blocks": {"4": 1}}, ValueError, "blocks must give an int >= 1 for each side, got 1 for '4'"),
        ({"first_scale": -1}, ValueError, "first_scale must be an int >= 0, got -1"),
        ({"first_scale": 3, "last_scale": 2}, ValueError, "last_scale must be an int >= first_scale=3, got 2"),
        ({"pick": 2}, ValueError, "pick must be one of 'best', 'resample', got 2"),
        ({"pick": "worst"}, ValueError, "pick must be one of 'best', 'resample', got 'worst'"),
        ({"temperature": 0}, ValueError, "temperature must be a finite number > 0, got 0"),
        ({"maps_at_once": 0}, ValueError, "maps_at_once must be an int >= 1, got 0"),
    ],
    ids=str,
)
def test_constructor_errors(options, error, message):
    with pytest.raises(error, match=message):
        BlockResample(**({"scorer": weighed} | options))


@pytest.mark.parametrize(
    "search, message",
    [
        (lambda: BlockResample(weighed, first_scale=5), "first_scale must be < 5, the model's scales, got 5"),
        (lambda: BlockResample(small_scorer(size=8)), "scorer was made for size=8, but the model has size=6"),
        (lambda: BlockResample(weighed, blocks={2: 1, 3: 1}), r"blocks must have an entry for maps of side 4, got {2"),
        (
            lambda: BlockResample(weighed, blocks=lambda scale, side: side - 4),
            "blocks must give a side >= 1 for scale 1, whose side is 2, got -2",
        ),
        (
            lambda: BlockResample(weighed, blocks=lambda scale, side: side / 2),
            "blocks must give a side >= 1 for scale 1, whose side is 2, got 1.0",
        ),
    ],
    ids=["first_scale", "scorer", "table", "function", "type"],
)
def test_a_search_that_does_not_fit_is_refused_before_any_work(search, message):
    model, search = small_var(), search()
    with idle(model):
        for refused in (patch, check, lambda model, search: generate(model, LABELS, search=search)):
            with pytest.raises(ValueError, match=message):
                refused(model, search)


def test_a_block_side_is_in_positions_of_the_transformer():
    case = CASES["Infinity, patchify"]
    model = case.build()
    given = {name: value for name, value in case.arguments(range(5)).items()}
    search = BlockResample(weighed, blocks={2: 1, 3: 1, 4: 1})
    with patched(model, search), pytest.raises(ValueError, match="blocks must have an entry for maps of side 6, got"):
        model.autoregressive_infer_cfg(**given, g_seed=0)
    search.blocks[6] = 2
    with patched(model, search):
        assert case.images(case.call(model, 0)).shape[0] == 5


def test_labels_that_the_scorer_does_not_know():
    model = small_var()
    search = BlockResample(small_scorer())
    with idle(model), pytest.raises(ValueError, match=r"must be in 0\.\.6, the scorer's classes, got 7"):
        generate(model, -1, search=search)
    plain = generate(model, -1, seeds=3).images
    assert torch.equal(generate(model, -1, seeds=3, search=BlockResample(small_scorer(), 1, 0)).images, plain)


def test_another_number_of_candidates():
    class Fewer(BlockResample):
        def num_candidates(self, scale, num_scales):
            return 5

    model = small_var()
    with pytest.raises(ValueError, match="candidates must be 16 in number, got 5"):
        generate(model, LABELS, search=Fewer(weighed))
    assert caches_closed(model)
