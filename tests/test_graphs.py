"""Captured generations: what is captured anew, what is only written into a graph, and what happens where none can be.

A GPU captures graphs; elsewhere a stand-in records the generation and runs it again at every replay, on the tensors
that the graph would read and into those that it would write. All but the capture itself is the same code.
"""

import contextlib
import copy
import pickle
import warnings

import pytest
import torch

import varkern
from tests.helpers import NUM_CLASSES, on, small_scorer, small_var
from tests.standins.models import FLEX_SIDES, small_flexvar
from varkern import graphs
from varkern.graphs import GenerationGraphs
from varkern.ops.backend import chosen_backend
from varkern.ops.fusion import list_tables
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
        with torch.inference_mode(written.is_inference()):  # a graph writes whatever the mode is
            written.copy_(generation())

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


def test_a_capture_is_logged_as_information(model, capture, caplog):
    """Slow but expected: it must not reach stderr in a program that sets up no logging."""
    varkern.patch(model, cuda_graph=True)
    with caplog.at_level("INFO", logger="varkern"):
        images(model)
        images(model)
    assert [(record.name, record.levelname) for record in caplog.records] == [("varkern", "INFO")]
    assert caplog.messages[0].startswith("capturing a CUDA graph for 3 images")


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


@pytest.mark.parametrize("what", ["model", "quantizer", "scorer", "autocast"])
def test_changed_weights_and_modes_are_captured_anew(model, capture, what):
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
    else:
        after = images(model)
        assert not torch.equal(before, after)
    assert len(capture) == 2 and after.shape == before.shape


def test_every_backend_and_mode_has_its_own_graph(model, monkeypatch):
    """Captures are counted and nothing runs, so that the interpreter need not."""
    captures = []

    def nothing(generation, where):
        captures.append((chosen_backend(), model.training))
        return lambda: None, torch.zeros(3, 3, 12, 12, device=where)

    monkeypatch.setattr(graphs, "capture_cuda", nothing)
    monkeypatch.setattr(GenerationGraphs, "hindrance", lambda self, device: None)
    varkern.patch(model, cuda_graph=True)
    for training in (False, True, False):
        for backend in ("torch", "triton"):
            with varkern.use_backend(backend):
                images(model.train(training))
    assert captures == [(backend, training) for training in (False, True) for backend in ("torch", "triton")]


@pytest.mark.parametrize("name, value", [("m", 2), ("pick", 2), ("temperature", 0.3), ("last_scale", 2)])
def test_changed_settings_of_a_search_are_captured_anew(model, capture, name, value):
    search = BestOfM(mean_feature, m=4, pick="resample")
    varkern.patch(model, search, cuda_graph=True)
    images(model)
    setattr(search, name, value)
    after = images(model)
    with varkern.patched(model, search):
        wanted = images(model)
    assert torch.equal(after, wanted) and len(capture) == 2


def test_a_search_that_counts_its_calls_is_captured_once(model, capture):
    class Counting(BestOfM):
        calls = 0

        def choose(self, candidates):
            self.calls = min(self.calls + 1, 2)  # a graph would not count; its stand-in runs this at every replay
            return super().choose(candidates)

    varkern.patch(model, Counting(mean_feature, m=2), cuda_graph=True)
    assert torch.equal(images(model), images(model)) and len(capture) == 1


def test_tables_outlive_what_forgets_them(model, capture):
    """A graph reads the tables made from weights and does not keep them alive."""
    with varkern.use_backend("torch"):
        varkern.patch(model, BestOfM(mean_feature, m=2), cuda_graph=True)
        images(model)
    (entry,) = vars(model)[METHOD].graphs.entries.values()
    held = {table.data_ptr() for tables in list_tables() for table in tables}
    assert held and held <= {table.data_ptr() for tables in entry.tables for table in tables}


def test_inside_the_callers_own_capture_it_runs_eagerly(model, capture, monkeypatch):
    varkern.patch(model, cuda_graph=True)
    with varkern.patched(model):
        wanted = images(model)
    monkeypatch.setattr(graphs, "capturing", lambda device: True)
    if model.lvl_1L.device.type == "cuda":
        pytest.skip("what stands in for a capture here would be one")
    assert torch.equal(images(model), wanted) and not capture


@pytest.mark.parametrize("ids", [[0, 5, -1], [index > 40 for index in range(64)]], ids=["ids", "mask"])
def test_listed_ids_are_copied_to_the_device_once(ids, device, monkeypatch):
    """A list among the options is on the device before a capture, which allows no copy from the host."""
    model, vae = small_flexvar()
    model.to(device), vae.to(device)
    given = {"vqvae": vae, "infer_patch_nums": FLEX_SIDES, "invalid_ids": ids}
    with varkern.patched(model):
        wanted = model.autoregressive_infer_cfg(B=3, label_B=LABELS.to(device), g_seed=0, **given)
        monkeypatch.setattr(torch, "tensor", None)
        got = model.autoregressive_infer_cfg(B=3, label_B=LABELS.to(device), g_seed=0, **given)
    assert torch.equal(got, wanted)


class StandIns:
    """Stands in for ``torch.cuda``: which stream is current where, and what was done in which order."""

    def __init__(self, monkeypatch, fails=False):
        self.current, self.done, self.fails = {0: "default", 1: "default"}, [], fails
        for name in ("Stream", "current_stream", "stream", "device", "CUDAGraph", "graph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    def Stream(self, device):
        return StreamStandIn(self, f"side of {device}", device.index)

    def current_stream(self, device):
        return StreamStandIn(self, self.current[device.index], device.index)

    @contextlib.contextmanager
    def stream(self, stream):
        before = self.current[stream.index]
        self.current[stream.index] = stream.name
        try:
            yield
        finally:
            self.current[stream.index] = before

    @contextlib.contextmanager
    def device(self, device):
        self.done.append(f"on {device}")
        yield

    class CUDAGraph:
        def replay(self):
            pass

    @contextlib.contextmanager
    def graph(self, graph, stream=None, capture_error_mode="global"):
        """As PyTorch's, it leaves the capturing stream current where the capture fails."""
        assert stream is not None, "PyTorch takes one stream for all captures of a process"
        self.done.append(f"capture in {stream.name}, {capture_error_mode}")
        self.current[stream.index] = stream.name
        yield


class StreamStandIn:
    def __init__(self, cuda, name, index):
        self.cuda, self.name, self.index = cuda, name, index

    def wait_stream(self, other):
        self.cuda.done.append(f"{self.name} waits for {other.name}")


@pytest.mark.parametrize("fails", [False, True], ids=["captured", "fails"])
def test_streams_and_device_of_a_capture(monkeypatch, fails):
    """Warm-up and capture share a stream of the model's GPU; the former stream is current afterwards, come what may."""
    cuda, ran = StandIns(monkeypatch), []

    def generation():
        ran.append(cuda.current[1])
        if fails and len(ran) == 2:
            raise RuntimeError("operation not permitted when stream is capturing")
        return torch.zeros(1)

    with pytest.raises(RuntimeError) if fails else contextlib.nullcontext():
        graphs.capture_cuda(generation, torch.device("cuda", 1))
    side = "side of cuda:1"
    assert ran == [side, side] and cuda.current == {0: "default", 1: "default"}
    waits = [f"{side} waits for default", f"default waits for {side}"]
    assert cuda.done == [waits[0], "on cuda:1", f"capture in {side}, thread_local", waits[1]]


def test_a_replay_waits_for_the_copy_of_the_one_before(model, capture, monkeypatch):
    """Else a replay in another stream would write over images that are still being copied."""
    if model.lvl_1L.device.type == "cuda":
        pytest.skip("streams are stand-ins here")
    varkern.patch(model, cuda_graph=True)
    images(model)
    method, done = vars(model)[METHOD].graphs, []

    class Stream:
        def wait_event(self, event):
            done.append(f"waits for {event}")

        def record_event(self):
            done.append("records")
            return f"event {len(done)}"

    (entry,) = method.entries.values()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    for _ in range(2):
        method.replayed(entry, {}, torch.device("cuda", 0))
    assert done == ["records", "waits for event 1", "records"]


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
