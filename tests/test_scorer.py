"""The scorer against a float64 form, in every precision, in training, and its files."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers import randomise, relative_error
from tests.references.scorer import eager_scores, exact_scores
from varkern import BestOfM, Scorer, ScorerConfig, generate, use_backend
from varkern.demo import run
from varkern.demo.train import SAMPLING
from varkern.scorer import stage_sides

SMALL = ScorerConfig(num_classes=5, num_scales=4, channels=6, size=7, widths=(8, 12), embedding=10, hidden=(14, 9))
LABELS = torch.tensor([4, 0, 2])


@pytest.fixture(scope="module")
def scorer():
    return randomise(Scorer(SMALL), 0).eval().requires_grad_(False)


@pytest.fixture
def features():
    return torch.randn(3, 4, 6, 7, 7, generator=torch.Generator().manual_seed(1))


def in_float64(scorer, labels, features, scales):
    """Scores of ``[N]`` labels and scales and ``[N, C, H, W]`` features."""
    return exact_scores(scorer.state_dict(), features, labels, scales)


@pytest.mark.parametrize(
    "scale",
    [2, torch.tensor(1), torch.tensor([0, 1, 3, 3]), torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0], [1, 1, 1, 1]])],
    ids=["int", "0-dim", "[M]", "[B, M]"],
)
def test_scores_equal_float64(scorer, features, scale):
    scores = scorer(LABELS, features, scale)
    scales = torch.as_tensor(scale).expand(3, 4).reshape(-1)
    wanted = in_float64(scorer, LABELS.repeat_interleave(4), features.flatten(0, 1), scales).view(3, 4)
    assert scores.shape == (3, 4) and scores.dtype == torch.float32
    assert relative_error(scores, wanted) < 1e-5


def test_class_and_scale_matter(scorer, features):
    scores = scorer(LABELS, features, 1)
    assert not torch.allclose(scores, scorer(LABELS.flip(0), features, 1), atol=1e-3)
    assert not torch.allclose(scores, scorer(LABELS, features, 2), atol=1e-3)


def test_a_candidates_score_ignores_its_neighbours(scorer, features):
    whole = scorer(LABELS, features, 1)
    for image, candidate in ((0, 0), (2, 3), (1, 2)):
        alone = scorer(LABELS[image : image + 1], features[image : image + 1, candidate : candidate + 1], 1)
        assert torch.allclose(alone.squeeze(), whole[image, candidate], atol=1e-5)
    order = [3, 1, 0, 2]
    assert torch.allclose(scorer(LABELS, features[:, order], 1), whole[:, order], atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)], ids=str)
def test_nothing_to_score(scorer, shape):
    labels = LABELS[: shape[0]]
    assert scorer(labels, torch.zeros(*shape, 6, 7, 7), 0).shape == shape
    assert scorer(labels, torch.zeros(*shape, 6, 7, 7), torch.zeros(shape, dtype=torch.int64)).shape == shape


def test_any_memory_format_and_precision(scorer, features):
    whole = scorer(LABELS, features, 1)
    last = features.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    assert torch.allclose(scorer(LABELS, last, 1), whole, atol=1e-5)
    sliced = torch.stack([features, features], dim=2)[:, :, 1]
    assert torch.equal(scorer(LABELS, sliced, 1), whole)
    for dtype in (torch.bfloat16, torch.float16):
        near = 30 * torch.finfo(dtype).eps * whole.abs().max()
        assert torch.allclose(scorer(LABELS, features.to(dtype), 1), whole, atol=near)
        half = randomise(Scorer(SMALL), 0).eval().to(dtype)(LABELS, features, 1)
        assert half.dtype == torch.float32 and torch.allclose(half, whole, atol=near)
        with torch.autocast("cpu", dtype):
            assert torch.allclose(scorer(LABELS, features, 1), whole, atol=near)


def test_equals_the_scorer_without_kernels(features):
    """The shipped weights and float32 on a CPU: what PyTorch's own layers give, to rounding."""
    scorer = Scorer.from_pretrained(run.WEIGHTS / "scorer.safetensors")
    maps = torch.randn(12, 16, 6, 6, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(12) % 10
    plain = eager_scores(scorer, labels, maps, 3)
    assert relative_error(scorer(labels, maps.unsqueeze(1), 3).squeeze(1), plain) < 1e-6


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_as_it_runs_on_a_gpu(scorer, features, device, backend):
    """By the kernels, in both memory formats."""
    scorer, labels, features = copy.deepcopy(scorer).to(device), LABELS[:2].to(device), features[:2, :2].to(device)
    with use_backend(backend):
        scores = scorer(labels, features, 2)
    scales = torch.full((4,), 2, device=device)
    wanted = in_float64(scorer, labels.repeat_interleave(2), features.flatten(0, 1), scales)
    assert relative_error(scores.flatten(), wanted) < 1e-5


def test_no_worse_in_half_precision_than_pytorchs_layers(scorer, features):
    """Against float64 of the same rounded weights and features."""
    lowered = copy.deepcopy(scorer).bfloat16()
    maps, labels = features.flatten(0, 1).bfloat16(), LABELS.repeat_interleave(4)
    exact = in_float64(lowered, labels, maps, torch.full((12,), 1))
    plain = eager_scores(lowered, labels, maps, 1) - exact
    ours = lowered(labels, maps.unsqueeze(1), 1).squeeze(1) - exact
    assert ours.square().mean() < 0.7 * plain.square().mean()
    assert ours.abs().max() < 0.02 * exact.abs().max()


class Remembering(BestOfM):
    """Keeps what it scored."""

    def score(self, candidates):
        features = candidates.fuse(0, candidates.tokens.shape[1])
        self.seen = [*getattr(self, "seen", []), (candidates.labels, features, candidates.scale)]
        return super().score(candidates)


def test_bfloat16_changes_few_choices(device, quick_backend):
    """On the shipped model, M=16: how far scores fall from float64's, and how often another candidate is the best."""
    model, scorer = run.load_demo(device)
    exact, lowered = copy.deepcopy(scorer).double(), copy.deepcopy(scorer).bfloat16()
    search = Remembering(scorer, 16)
    with use_backend(quick_backend):
        generate(model, torch.arange(15) % 10, seeds=0, search=search, **SAMPLING)
        pairs = [(exact(*given).double(), lowered(*given).double()) for given in search.seen]
    wanted, found = (torch.cat(scores) for scores in zip(*pairs, strict=True))
    spread = wanted.std(1).mean()
    error = (found - wanted) - (found - wanted).mean(1, keepdim=True)  # what is common to an image decides nothing
    error = (error.square().mean().sqrt() / spread).item()
    changed = (found.argmax(1) != wanted.argmax(1)).double().mean().item()
    lost = ((wanted.amax(1) - wanted.gather(1, found.argmax(1, keepdim=True))[:, 0]).mean() / spread).item()
    print(
        f"\nbfloat16, {len(wanted)} greedy choices of 16: error {error:.3f} of the scores' spread within an image, "
        f"{changed:.1%} of choices change, which costs {lost:.4f} of the spread"
    )
    assert error < 0.04 and changed < 0.12 and lost < 0.005
    assert len(found.unique()) > 0.99 * len(wanted.unique())  # scores themselves are not rounded to bfloat16


def test_the_weights_dtype_decides_and_autocast_lowers_float32_only(scorer, features):
    halves = {dtype: copy.deepcopy(scorer).to(dtype) for dtype in (torch.bfloat16, torch.float16, torch.float64)}
    plain = {dtype: lowered(LABELS, features, 1) for dtype, lowered in halves.items()}
    whole = scorer(LABELS, features, 1)
    assert scorer.input_dtype == torch.float32 and scorer.channels_last
    with torch.autocast("cpu", torch.bfloat16):
        assert scorer.input_dtype == torch.bfloat16
        for dtype, lowered in halves.items():
            assert lowered.input_dtype == (torch.float32 if dtype == torch.float64 else dtype)
            assert torch.equal(lowered(LABELS, features, 1), plain[dtype])
        scores = scorer(LABELS, features, 1)
        assert torch.equal(scores, scorer(LABELS, features.bfloat16(), 1))
    assert scores.dtype == torch.float32 and not torch.equal(scores, scores.bfloat16().float())
    assert 1e-4 < relative_error(scores, whole) < 0.05
    assert plain[torch.float64].dtype == torch.float64 and relative_error(whole, plain[torch.float64]) < 1e-5


class Conversions(TorchDispatchMode):
    """Counts the conversions of tensors to another dtype."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._to_copy.default and args[0].dtype != kwargs.get("dtype")
        return function(*args, **(kwargs or {}))


def test_weights_are_converted_once_until_they_change(scorer, features):
    """The linear layers of a scorer in bfloat16, against layers whose weights are converted at every call."""
    lowered, counts = copy.deepcopy(scorer).bfloat16(), []

    def anew():
        return copy.deepcopy(lowered).requires_grad_(True)(LABELS, features, 1).detach()

    def count():
        with Conversions() as conversions:
            scores = lowered(LABELS, features, 1)
        counts.append(conversions.count)
        assert torch.equal(scores, anew())
        return scores

    first, again = count(), count()
    lowered.fuser[0].weight.mul_(-1.5)
    changed, _ = count(), count()
    lowered.load_state_dict(scorer.state_dict())
    loaded = count()
    lowered.out_proj.bias = nn.Parameter(lowered.out_proj.bias + 2, requires_grad=False)
    moved = count()
    assert torch.equal(first, again) and torch.equal(first, loaded) and not torch.equal(first, changed)
    assert torch.allclose(moved, first + 2, atol=0.05) and not torch.equal(moved, first)
    own, linear = counts[1], 2 * (2 + len(SMALL.hidden) + 1)  # own: of features, embeddings and norms
    assert counts == [own + linear, own, own + 2, own, own + linear, own + 2]
    with torch.inference_mode():
        assert torch.equal(lowered(LABELS, features, 1), moved)
    maps = features.clone().requires_grad_()
    lowered(LABELS, maps, 1).sum().backward()
    assert maps.grad.abs().sum() > 0


def test_without_data(scorer):
    """On the meta device, where work is counted and none is done."""
    scorer = copy.deepcopy(scorer).bfloat16().to("meta")
    assert scorer(LABELS.to("meta"), torch.empty(3, 4, 6, 7, 7, device="meta"), 1).shape == (3, 4)


def test_features_that_are_as_wanted_are_not_copied(scorer, features):
    lowered, read = copy.deepcopy(scorer).bfloat16(), []
    lowered.conv_stage_1[0].conv1.register_forward_pre_hook(lambda _, given: read.append(given[0].data_ptr()))
    last = features.bfloat16().permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    lowered(LABELS, last, 1)
    lowered(LABELS, features.bfloat16(), 1)
    assert read[0] == last.data_ptr() and read[1] != features.data_ptr()


def test_weights_are_channels_last(scorer, tmp_path):
    scorer.save_pretrained(tmp_path / "s.safetensors")
    loaded = Scorer.from_pretrained(tmp_path / "s.safetensors", dtype=torch.bfloat16)
    for one in (Scorer(SMALL), loaded, copy.deepcopy(scorer), copy.deepcopy(scorer).double()):
        kernels = [p for p in one.parameters() if p.dim() == 4]
        assert len(kernels) == 14
        assert all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)


def test_starting_weights_are_drawn_before_the_memory_format_is_chosen(monkeypatch):
    torch.manual_seed(5)
    wanted = Scorer(SMALL).state_dict()
    monkeypatch.setattr(Scorer, "to", lambda self, **_: self)
    torch.manual_seed(5)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in Scorer(SMALL).state_dict().items())


def test_gradients_reach_every_parameter(features):
    scorer = randomise(Scorer(SMALL), 0)
    scorer(LABELS, features, torch.arange(4)).square().sum().backward()
    assert [n for n, p in scorer.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_trains_under_autocast(features, device, backend):
    """Gradients of float32 weights, near those without autocast; as a GPU would compute them too."""
    scorer = randomise(Scorer(SMALL), 0).eval().to(device)
    labels, features = LABELS[:2].to(device), features[:2, :2].to(device)

    def gradients():
        loss = F.softplus(scorer(labels, features, 1)).mean()
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, scorer.parameters())])

    with use_backend("torch"):
        wanted = gradients()
    with use_backend(backend), torch.autocast(device.type, torch.bfloat16):
        found = gradients()
    assert found.dtype == torch.float32
    assert F.cosine_similarity(found, wanted, dim=0) > 0.99


def test_gradcheck():
    config = ScorerConfig(
        num_classes=2, num_scales=2, channels=2, size=3, widths=(3,), embedding=2, hidden=(2, 2), dropout=0.0
    )
    scorer = randomise(Scorer(config), 0).double()
    maps = torch.randn(2, 1, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    names = ["conv_stage_1.0.ln3.bias", "conv_stage_1.0.shortcut.0.weight", "conv_stage_1.1.ln1.weight"]
    parameters = [scorer.get_parameter(name) for name in names]

    def scores(maps, *values):
        given = dict(zip(names, values, strict=True))
        return torch.func.functional_call(scorer, given, (torch.tensor([1, 0]), maps, 1))

    assert torch.autograd.gradcheck(scores, (maps, *parameters), fast_mode=True)


def test_compiles_as_one_graph(scorer, features):
    for one in (scorer, copy.deepcopy(scorer).bfloat16()):
        compiled = torch.compile(one, fullgraph=True, backend="aot_eager")
        eager = one(LABELS, features, 1)
        assert torch.allclose(compiled(LABELS, features, 1), eager, rtol=0, atol=1e-2 * eager.abs().max().item())


def test_distributed_data_parallel(features, tmp_path, recwarn):
    """Gradients lie as their weights do, so that buckets need no copies, of which PyTorch would warn."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        plain = randomise(Scorer(SMALL), 0).eval()
        wrapped = torch.nn.parallel.DistributedDataParallel(copy.deepcopy(plain))
        for scorer in (plain, wrapped):
            scorer(LABELS, features, torch.arange(4)).square().mean().backward()
        for one, other in zip(plain.parameters(), wrapped.module.parameters(), strict=True):
            assert torch.allclose(one.grad, other.grad, rtol=1e-5) and one.grad.stride() == one.stride()
        assert not [warning for warning in recwarn if "strides" in str(warning.message)]
    finally:
        torch.distributed.destroy_process_group()


PUBLISHED_BLOCK = {
    "conv1.weight": lambda before, width, side: (width, before, 3, 3),
    "ln1.weight": lambda before, width, side: (width, side, side),
    "ln1.bias": lambda before, width, side: (width, side, side),
    "conv2.weight": lambda before, width, side: (width, width, 3, 3),
    "ln2.weight": lambda before, width, side: (width, side, side),
    "ln2.bias": lambda before, width, side: (width, side, side),
    "conv3.weight": lambda before, width, side: (width, width, 1, 1),
    "ln3.weight": lambda before, width, side: (width, side, side),
    "ln3.bias": lambda before, width, side: (width, side, side),
}
PUBLISHED_SHORTCUT = {
    "shortcut.0.weight": lambda before, width, side: (width, before, 1, 1),
    "shortcut.1.weight": lambda before, width, side: (width, side, side),
    "shortcut.1.bias": lambda before, width, side: (width, side, side),
}
PUBLISHED_REST = {
    "class_label_embedding.weight": (1000, 128),
    "class_label_proj.weight": (128, 128),
    "class_label_proj.bias": (128,),
    "stage_label_embedding.weight": (10, 128),
    "stage_label_proj.weight": (128, 128),
    "stage_label_proj.bias": (128,),
    "fuser.0.weight": (512, 1280),
    "fuser.0.bias": (512,),
    "fuser.2.weight": (256, 512),
    "fuser.2.bias": (256,),
    "fuser.4.weight": (128, 256),
    "fuser.4.bias": (128,),
    "out_proj.weight": (1, 128),
    "out_proj.bias": (1,),
}


def published_shapes():
    """Names and shapes of the published network's state dict, in its order."""
    shapes, before = {}, 32
    for stage, (width, side) in enumerate(((64, 8), (128, 4), (256, 2)), 1):
        for block, names in enumerate((PUBLISHED_BLOCK | PUBLISHED_SHORTCUT, PUBLISHED_BLOCK)):
            for name, shape in names.items():
                shapes[f"conv_stage_{stage}.{block}.{name}"] = shape(before, width, side)
            before = width
    return shapes | PUBLISHED_REST


def test_the_published_names_shapes_and_size():
    scorer = Scorer()
    assert {name: tuple(tensor.shape) for name, tensor in scorer.state_dict().items()} == published_shapes()
    assert list(scorer.state_dict()) == list(published_shapes())
    assert sum(p.numel() for p in scorer.parameters()) == 4_007_425
    assert [stage[2].p for stage in scorer.stages] == [0.05] * 3
    assert scorer(torch.tensor([999]), torch.randn(1, 2, 32, 16, 16), 9).shape == (1, 2)


@pytest.mark.parametrize(
    "size, sides, widths",
    [
        (3, (2,), (64,)),
        (6, (3, 2), (64, 128)),
        (7, (4, 2), (64, 128)),
        (16, (8, 4, 2), (64, 128, 256)),
        (32, (16, 8, 4, 2), (64, 128, 256, 256)),
    ],
)
def test_as_many_stages_as_lead_to_two_by_two(size, sides, widths):
    config = ScorerConfig(size=size, num_classes=3, hidden=(8,))
    assert config.widths == widths and stage_sides(size) == sides
    scorer = Scorer(config)
    assert [tuple(stage[0].ln1.weight.shape) for stage in scorer.stages] == [
        (width, side, side) for width, side in zip(widths, sides, strict=True)
    ]
    assert scorer(torch.tensor([1]), torch.randn(1, 1, 32, size, size), 0).shape == (1, 1)


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"widths": (8, 8)}, r"one number for each of the 3 stages that halve size=16 down to 2, got 2"),
        ({"size": 32, "widths": (8, 8, 8)}, r"one number for each of the 4 stages that halve size=32 down to 2, got 3"),
        ({"size": 2}, r"size must be at least 3, got 2"),
        ({"hidden": ()}, r"hidden must have at least one width, got none"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
    ],
    ids=["too few", "512 px", "two pixels", "no MLP", "all dropped"],
)
def test_a_config_that_describes_no_scorer(sizes, message):
    with pytest.raises(ValueError, match=message):
        ScorerConfig(**sizes)


def test_dropout_in_training_only(features):
    scorer = randomise(Scorer(SMALL), 0)
    torch.manual_seed(0)
    first, second = scorer(LABELS, features, 1), scorer(LABELS, features, 1)
    assert not torch.allclose(first, second, atol=1e-3)
    scorer.eval()
    assert torch.equal(scorer(LABELS, features, 1), scorer(LABELS, features, 1))


def test_starting_weights_are_the_published_ones():
    torch.manual_seed(0)
    scorer = Scorer()
    weights = scorer.state_dict()
    for name, tensor in weights.items():
        if tensor.dim() == 4:  # He: variance 2 over outputs times kernel
            assert tensor.std().item() == pytest.approx((2 / tensor[:, 0].numel()) ** 0.5, rel=0.05), name
        elif "embedding" in name:
            assert tensor.std().item() == pytest.approx(0.02, rel=0.1) and tensor.abs().max() < 0.11
        elif tensor.dim() == 2:  # Glorot: uniform
            bound = (6 / sum(tensor.shape)) ** 0.5
            assert 0.9 * bound < tensor.abs().max() <= bound
        else:
            assert (tensor == (1 if name.endswith("weight") else 0)).all()


def test_published_files(scorer, features, tmp_path):
    """A state dict alone, ``.pth`` or safetensors: shapes tell the sizes, of an even latent."""
    even = ScorerConfig(num_classes=5, num_scales=4, channels=6, size=8, widths=(8, 12), embedding=10, hidden=(14, 9))
    published = randomise(Scorer(even), 3).eval()
    torch.save(published.state_dict(), tmp_path / "scoring_model.pth")
    save_file({k: v.contiguous() for k, v in published.state_dict().items()}, tmp_path / "plain.safetensors")
    maps = torch.randn(3, 4, 6, 8, 8, generator=torch.Generator().manual_seed(1))
    for name in ("scoring_model.pth", "plain.safetensors"):
        loaded = Scorer.from_pretrained(tmp_path / name)
        assert loaded.config == even and not loaded.training
        assert torch.equal(loaded(LABELS, maps, 1), published(LABELS, maps, 1))
    torch.save(Scorer().state_dict(), tmp_path / "full.pth")
    assert Scorer.from_pretrained(tmp_path / "full.pth").config == ScorerConfig()


class Touch:
    """An object whose unpickling would run code."""

    def __reduce__(self):
        return print, ("unpickled",)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda state: state | {"class_label_proj.bias": torch.zeros(3)},
        lambda state: {k: v for k, v in state.items() if k != "conv_stage_2.1.ln3.bias"},
        lambda state: state | {"more": torch.zeros(1)},
        lambda state: {k: v for k, v in state.items() if not k.startswith("class")},
        lambda state: {"model": state},
        lambda state: Touch(),
    ],
    ids=["shape", "missing", "more", "no embedding", "nested", "code"],
)
def test_published_files_that_do_not_fit(spoil, tmp_path, capsys):
    even = ScorerConfig(num_classes=5, num_scales=4, channels=6, size=8, widths=(8, 12), embedding=10, hidden=(14, 9))
    torch.save(spoil(dict(Scorer(even).state_dict())), tmp_path / "s.pth")
    with pytest.raises(ValueError, match=r"s\.pth is not a scorer's file: ."):
        Scorer.from_pretrained(tmp_path / "s.pth")
    assert "unpickled" not in capsys.readouterr().out


def test_round_trip(scorer, features, tmp_path):
    path = tmp_path / "scorer.safetensors"
    scorer.save_pretrained(path, metadata={"trained on": "digits"})
    assert [p.name for p in tmp_path.iterdir()] == ["scorer.safetensors"]
    loaded = Scorer.from_pretrained(path)
    assert loaded.config == SMALL and isinstance(loaded.config.widths, tuple)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert torch.equal(loaded(LABELS, features, 1), scorer(LABELS, features, 1))
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["trained on"] == "digits"
        assert json.loads(file.metadata()["config"])["widths"] == [8, 12]
    assert {p.dtype for p in Scorer.from_pretrained(str(path), dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


def test_a_save_that_fails_leaves_the_former_file(scorer, tmp_path, monkeypatch):
    path = tmp_path / "scorer.safetensors"
    scorer.save_pretrained(path)
    before = path.read_bytes()

    def fail(descriptor):
        raise OSError(28, "disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        randomise(Scorer(SMALL), 1).save_pretrained(path)
    assert path.read_bytes() == before


def spoilt(kind, path):
    good = {k: v.contiguous() for k, v in Scorer(SMALL).state_dict().items()}
    config = {**vars(SMALL), "widths": [8, 12]}
    match kind:
        case "no safetensors":
            path.write_bytes(b"PK\x03\x04 something else")
        case "empty":
            path.write_bytes(b"")
        case "config no JSON":
            save_file(good, path, {"config": "widths=3"})
        case "config of something else":
            save_file(good, path, {"config": json.dumps({"depth": 16})})
        case "config of other sizes":
            save_file(good, path, {"config": json.dumps(config | {"hidden": [14, 10]})})
        case "weight missing":
            save_file({k: v for k, v in good.items() if k != "fuser.0.bias"}, path, {"config": json.dumps(config)})


@pytest.mark.parametrize(
    "kind",
    [
        "no safetensors",
        "empty",
        "config no JSON",
        "config of something else",
        "config of other sizes",
        "weight missing",
    ],
)
def test_bad_files(kind, tmp_path):
    spoilt(kind, tmp_path / "s.safetensors")
    with pytest.raises(ValueError, match=r"s\.safetensors is not a scorer's file: ."):
        Scorer.from_pretrained(tmp_path / "s.safetensors")


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no scorer at .*s\.safetensors"):
        Scorer.from_pretrained(tmp_path / "s.safetensors")
    with pytest.raises(FileNotFoundError, match="no scorer at"):
        Scorer.from_pretrained(tmp_path)
