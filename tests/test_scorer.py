"""The scorer against a float64 form, in every precision, in training, and its files."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

import varkern.scorer
from tests.helpers import randomise, relative_error
from tests.references.norm import eager_scores
from tests.references.vqvae import weights_of
from varkern import BestOfM, Scorer, ScorerConfig, generate, use_backend
from varkern.demo import run
from varkern.demo.train import SAMPLING

SMALL = ScorerConfig(num_classes=5, num_scales=4, channels=6, size=7, widths=(8, 12, 16), embedding=10, hidden=9)
LABELS = torch.tensor([4, 0, 2])


@pytest.fixture(scope="module")
def scorer():
    return randomise(Scorer(SMALL), 0).eval().requires_grad_(False)


@pytest.fixture
def features():
    return torch.randn(3, 4, 6, 7, 7, generator=torch.Generator().manual_seed(1))


def rectified(x):
    return torch.where(x > 0, x, 0.2 * x)


def in_float64(scorer, labels, features, scales):
    """Scores of ``[N]`` labels and scales and ``[N, C, H, W]`` features, layer by layer from the state dict."""
    weights = {k.removeprefix("visual."): v for k, v in weights_of(scorer).items()}

    def conv(x, name, stride=1):
        weight = weights[f"{name}.weight"]
        return F.conv2d(x, weight, weights[f"{name}.bias"], stride=stride, padding=weight.shape[-1] // 2)

    def norm(x, name):  # over the channels of a pixel
        centred = x - x.mean(1, keepdim=True)
        x = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
        return x * weights[f"{name}.weight"][:, None, None] + weights[f"{name}.bias"][:, None, None]

    def block(x, name):  # 3x3, 3x3, 1x1, each normalised, two rectified; plus the input; rectified
        y = rectified(norm(conv(x, f"{name}.branch.0"), f"{name}.branch.1"))
        y = rectified(norm(conv(y, f"{name}.branch.3"), f"{name}.branch.4"))
        return rectified(x + norm(conv(y, f"{name}.branch.6"), f"{name}.branch.7"))

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    x = block(norm(conv(features.double(), "0"), "1"), "2")
    for place in range(3, 3 * len(scorer.config.widths), 3):
        x = block(norm(conv(x, f"{place}", stride=2), f"{place + 1}"), f"{place + 2}")
    assert x.shape[2:] == (2, 2)
    x = torch.cat(
        [x.flatten(1), weights["class_embedding.weight"][labels], weights["scale_embedding.weight"][scales]], 1
    )
    return linear(rectified(linear(rectified(linear(x, "head.0")), "head.2")), "head.4").squeeze(1)


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
        half = randomise(Scorer(SMALL), 0).to(dtype)(LABELS, features, 1)
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
def test_as_it_runs_on_a_gpu(scorer, features, device, backend, monkeypatch):
    """A GPU's convolutions leave their bias to the norm."""
    monkeypatch.setattr(varkern.scorer, "bias_costs_a_pass", lambda x: True)
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


def test_without_data(scorer):
    """On the meta device, where work is counted and none is done."""
    scorer = copy.deepcopy(scorer).bfloat16().to("meta")
    assert scorer(LABELS.to("meta"), torch.empty(3, 4, 6, 7, 7, device="meta"), 1).shape == (3, 4)


def test_features_that_are_as_wanted_are_not_copied(scorer, features):
    lowered, read = copy.deepcopy(scorer).bfloat16(), []
    lowered.visual[0].register_forward_pre_hook(lambda _, given: read.append(given[0].data_ptr()))
    last = features.bfloat16().permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    lowered(LABELS, last, 1)
    lowered(LABELS, features.bfloat16(), 1)
    assert read[0] == last.data_ptr() and read[1] != features.data_ptr()


def test_weights_are_channels_last(scorer, tmp_path):
    scorer.save_pretrained(tmp_path / "s.safetensors")
    loaded = Scorer.from_pretrained(tmp_path / "s.safetensors", dtype=torch.bfloat16)
    for one in (Scorer(SMALL), loaded, copy.deepcopy(scorer), copy.deepcopy(scorer).double()):
        kernels = [p for p in one.parameters() if p.dim() == 4]
        assert len(kernels) == 12
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
def test_trains_under_autocast(features, device, backend, monkeypatch):
    """Gradients of float32 weights, near those without autocast; as a GPU would compute them too."""
    monkeypatch.setattr(varkern.scorer, "bias_costs_a_pass", lambda x: backend == "triton")
    scorer = randomise(Scorer(SMALL), 0).to(device)
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
    config = ScorerConfig(num_classes=2, num_scales=2, channels=2, size=3, widths=(2, 3), embedding=2, hidden=2)
    scorer = randomise(Scorer(config), 0).double()
    maps = torch.randn(2, 1, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    names = ["visual.2.branch.6.bias", "visual.3.weight", "visual.4.weight"]
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
        plain = randomise(Scorer(SMALL), 0)
        wrapped = torch.nn.parallel.DistributedDataParallel(copy.deepcopy(plain))
        for scorer in (plain, wrapped):
            scorer(LABELS, features, torch.arange(4)).square().mean().backward()
        for one, other in zip(plain.parameters(), wrapped.module.parameters(), strict=True):
            assert torch.allclose(one.grad, other.grad, rtol=1e-5) and one.grad.stride() == one.stride()
        assert not [warning for warning in recwarn if "strides" in str(warning.message)]
    finally:
        torch.distributed.destroy_process_group()


def test_imagenet_size():
    scorer = Scorer()
    assert abs(sum(p.numel() for p in scorer.parameters()) - 4.0e6) < 0.3e6
    assert scorer.class_embedding.weight.shape == (1000, 128) and scorer.scale_embedding.weight.shape == (10, 128)
    assert scorer.head[0].in_features == 1024 + 2 * 128
    assert scorer(torch.tensor([999]), torch.randn(1, 2, 32, 16, 16), 9).shape == (1, 2)


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"size": 32}, r"widths must halve size=32 down to 2, got 4 widths, which end at 4"),
        ({"widths": (8, 8)}, r"widths must halve size=16 down to 2, got 2 widths, which end at 8"),
        ({"size": 1}, r"widths must halve size=1 down to 2"),
    ],
    ids=["512 px", "too few", "one pixel"],
)
def test_a_config_must_end_at_two_by_two(sizes, message):
    with pytest.raises(ValueError, match=message):
        ScorerConfig(**sizes)


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
        assert json.loads(file.metadata()["config"])["widths"] == [8, 12, 16]
    assert {p.dtype for p in Scorer.from_pretrained(str(path), dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


def test_a_save_that_fails_leaves_the_former_file(scorer, tmp_path, monkeypatch):
    path = tmp_path / "scorer.safetensors"
    scorer.save_pretrained(path)
    before = path.read_bytes()

    def fail(weights, filename, metadata):
        filename.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("varkern.scorer.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        randomise(Scorer(SMALL), 1).save_pretrained(path)
    assert path.read_bytes() == before


def spoilt(kind, path):
    good = {k: v.contiguous() for k, v in Scorer(SMALL).state_dict().items()}
    config = {**vars(SMALL), "widths": [8, 12, 16]}
    match kind:
        case "no safetensors":
            path.write_bytes(b"PK\x03\x04 something else")
        case "empty":
            path.write_bytes(b"")
        case "no config":
            save_file(good, path)
        case "config no JSON":
            save_file(good, path, {"config": "widths=3"})
        case "config of something else":
            save_file(good, path, {"config": json.dumps({"depth": 16})})
        case "config of other sizes":
            save_file(good, path, {"config": json.dumps(config | {"hidden": 10})})
        case "weight missing":
            save_file({k: v for k, v in good.items() if k != "head.0.bias"}, path, {"config": json.dumps(config)})


@pytest.mark.parametrize(
    "kind",
    [
        "no safetensors",
        "empty",
        "no config",
        "config no JSON",
        "config of something else",
        "config of other sizes",
        "weight missing",
    ],
)
def test_bad_files(kind, tmp_path):
    spoilt(kind, tmp_path / "s.safetensors")
    with pytest.raises(ValueError, match=r"s\.safetensors is not a scorer's safetensors file: ."):
        Scorer.from_pretrained(tmp_path / "s.safetensors")


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no scorer at .*s\.safetensors"):
        Scorer.from_pretrained(tmp_path / "s.safetensors")
    with pytest.raises(FileNotFoundError, match="no scorer at"):
        Scorer.from_pretrained(tmp_path)
