"""Captured generations: what is captured anew, what is only written into a graph, and what happens where none can be.

A GPU captures graphs; elsewhere a stand-in records the generation and runs it again at every replay, on the tensors
that the graph would read and into those that it would write. All but the capture itself is the same code.
"""

import copy
import pickle
import warnings

import pytest
import torch

import varkern
from tests.helpers import NUM_CLASSES, on, small_scorer, small_var
from varkern import graphs
from varkern.graphs import GenerationGraphs
from varkern.patching import PatchedMethod
from varkern.search import BestOfM

METHOD = "autoregressive_infer_cfg"
LABELS = torch.tensor([3, 0, 5])


def mean_feature(labels, features, scale):
    return features.mean((2, 3, 4))


def best_of(m):
    return BestOfM(small_scorer(), m=m)


def again(generation, device):
    """A capture's stand-in on a CPU."""
    written = generation()

    def replay():
        with torch.inference_mode(written.images.is_inference()):  # a graph writes whatever the mode is
            new = generation()
            for name in ("tokens", "scores", "choices"):
                for old, value in zip(getattr(written, name), getattr(new, name), strict=True):
                    if old is not None:
                        old.copy_(value)
            written.images.copy_(new.images)

    return replay, written


@pytest.fixture
def capture(device, monkeypatch):
    """Counts captures; on a CPU they are stand-ins."""
    captures = []
    real = graphs.capture_cuda if device.type == "cuda" else again

    def counted(generation, where):
        captures.append(where)
        return real(generation, where)

    monkeypatch.setattr(graphs, "capture_cuda", counted)
    monkeypatch.setattr(GenerationGraphs, "hindrance", lambda self, device: None)
    return captures


@pytest.fixture
def model(device):
    return on(small_var(), device)


def images(model, labels=LABELS, g_seed=0, **options):
    options = {"cfg": 2.0, "top_k": 20, "top_p": 0.9, **options}
    if isinstance(labels, torch.Tensor):
        labels = labels.to(model.lvl_1L.device)
    return getattr(model, METHOD)(3, labels, g_seed, **options)


CALLS = [
    {},
    {"g_seed": 7},
    {"labels": torch.tensor([1, 1, 2])},
    {"cfg": 1.3},
    {"cfg": torch.tensor([0.5, 1.5, 2.5]).view(3, 1, 1)},
    {"labels": 4},
    {"labels": -1},
    {"g_seed": torch.tensor([5, 6, 7])},
]


@pytest.mark.parametrize("search", [None, BestOfM(mean_feature, m=4, pick=2)], ids=["no search", "2 of 4"])
def test_images_equal_the_uncaptured_ones_with_one_capture(model, capture, search):
    with varkern.patched(model, search):
        wanted = [images(model, **call) for call in CALLS]
    varkern.patch(model, search, cuda_graph=True)
    got = [images(model, **call) for call in CALLS]
    varkern.unpatch(model)
    for call, a, b in zip(CALLS, got, wanted, strict=True):
        assert torch.equal(a, b), call
    assert len(capture) == 1
    assert len({float(image.sum()) for image in got}) > 5  # the calls do differ


@pytest.mark.parametrize(
    "change",
    [{"top_k": 5}, {"top_p": 0.5}, {"cfg": 0}, {"more_smooth": True}, {"labels": None}],
    ids=str,
)
def test_other_settings_are_captured_anew(model, capture, change):
    with varkern.patched(model):
        wanted = images(model, **change)
    varkern.patch(model, cuda_graph=True)
    images(model)
    assert torch.equal(images(model, **change), wanted)
    assert len(capture) == 2
    images(model)
    images(model, **change)
    assert len(capture) == 2


def test_only_the_latest_are_kept(model, capture):
    varkern.patch(model, cuda_graph=True)
    for top_k in range(1, graphs.KEPT + 2):
        images(model, top_k=top_k)
    assert len(capture) == graphs.KEPT + 1
    images(model, top_k=graphs.KEPT + 1)
    assert len(capture) == graphs.KEPT + 1
    images(model, top_k=1)  # the one that went
    assert len(capture) == graphs.KEPT + 2


def test_earlier_images_are_not_overwritten(model, capture):
    varkern.patch(model, cuda_graph=True)
    first = images(model)
    kept = first.clone()
    assert not torch.equal(images(model, g_seed=1), kept)
    assert torch.equal(first, kept)


@pytest.mark.parametrize("what", ["model", "quantizer", "scorer", "autocast", "backend"])
def test_changed_weights_and_modes_are_captured_anew(model, capture, what, quick_backend):
    if what == "backend" and quick_backend == "torch":
        pytest.skip("the other backend is the interpreter here, which is slow")
    search = best_of(2)
    varkern.patch(model, search, cuda_graph=True)
    before = images(model)
    with torch.no_grad():
        if what == "model":
            model.head.weight.mul_(0.5)
        elif what == "quantizer":
            model.vae_quant_proxy[0].embedding.weight.mul_(1.1)
        elif what == "scorer":
            for weight in search.scorer.parameters():
                weight.neg_()
    if what == "autocast":
        with torch.autocast(model.lvl_1L.device.type, torch.bfloat16):
            after = images(model)
    elif what == "backend":
        with varkern.use_backend("torch"):
            after = images(model)
    else:
        after = images(model)
        assert not torch.equal(before, after)
    assert len(capture) == 2 and after.shape == before.shape


def test_in_and_out_of_inference_mode(model, capture):
    varkern.patch(model, cuda_graph=True)
    with torch.inference_mode():
        first = images(model)
    second = images(model)
    with torch.inference_mode():
        third = images(model)
    assert torch.equal(first, second) and torch.equal(second, third) and len(capture) == 1


def test_what_cannot_be_captured_warns_once_and_still_works(model, device, monkeypatch):
    def waits(labels, features, scale):
        if device.type == "cuda":
            features.sum().item()
        return mean_feature(labels, features, scale)

    def refuses(generation, where):
        raise RuntimeError("operation not permitted when stream is capturing\nmore lines")

    if device.type != "cuda":
        monkeypatch.setattr(graphs, "capture_cuda", refuses)
        monkeypatch.setattr(GenerationGraphs, "hindrance", lambda self, device: None)
    search = BestOfM(waits, m=3)
    with varkern.patched(model, search):
        wanted = images(model)
    varkern.patch(model, search, cuda_graph=True)
    with pytest.warns(RuntimeWarning, match="cuda_graph=True: capturing failed .* Generating without a graph"):
        assert torch.equal(images(model), wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(images(model), wanted)


def test_on_a_cpu_one_warning_says_so():
    model = small_var()
    varkern.patch(model, cuda_graph=True)
    with pytest.warns(RuntimeWarning, match="the model is on cpu, and only a GPU has graphs"):
        first = images(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(images(model), first)


def test_bad_requests_are_told_as_without_a_graph(model, capture):
    varkern.patch(model, cuda_graph=True)
    with pytest.raises(ValueError, match=rf"in 0..{NUM_CLASSES}, got 0..99"):
        images(model, labels=torch.tensor([0, 99, 0]))
    with pytest.raises(ValueError, match="cfg must be a finite number"):
        images(model, cfg=float("nan"))
    assert not capture


def test_an_empty_batch(model, capture):
    varkern.patch(model, cuda_graph=True)
    assert getattr(model, METHOD)(0, torch.zeros(0, dtype=torch.int64, device=model.lvl_1L.device)).shape[0] == 0
    assert not capture


def test_a_graph_needs_philox():
    with pytest.raises(ValueError, match=r"cuda_graph=True needs sampler='philox'.*got 'multinomial'"):
        varkern.patch(small_var(), sampler="multinomial", cuda_graph=True)


def test_copies_carry_no_graph(model, capture):
    varkern.patch(model, cuda_graph=True)
    images(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not isinstance(vars(other).get(METHOD), PatchedMethod)
    varkern.unpatch(model)
    assert METHOD not in vars(model)
