"""The contract of F(.) apart from its numbers: errors, tables that follow the weights, registration, compilation."""

import pytest
import torch
from torch import zeros

from tests.references.fusion import case, chain, relative_error
from varkern.ops import fusion_tables
from varkern.ops.backend import use_backend
from varkern.ops.fusion import commit_tokens, fuse_tokens

SIDE, SIZE, C = 3, 5, 8


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    with use_backend(request.param):
        yield request.param


@pytest.fixture
def made(monkeypatch):
    """A list that grows by one whenever a table is made from weights; the cache starts empty."""
    fusion_tables.clear_tables()
    calls, scaled = [], fusion_tables.folded_phi

    def recorded(*given):
        calls.append(given)
        return scaled(*given)

    monkeypatch.setattr(fusion_tables, "folded_phi", recorded)
    yield calls
    fusion_tables.clear_tables()


def good(**change):
    tokens, codebook, f_hat, phi = case("cpu", SIDE, SIZE, C=C)
    given = {"tokens": tokens, "codebook": codebook, "f_hat": f_hat, "phi": phi, "side": SIDE, "size": SIZE}
    return given | change


def bad(name, error, message, **change):
    return pytest.param(change, error, message, id=name)


WEIGHT, BIAS = zeros(C, C, 3, 3), zeros(C)
BAD = [
    bad("tokens-rank", ValueError, r"tokens .*\[B, M, l\], got \[2, 9\]", tokens=zeros(2, 9).long()),
    bad("tokens-float", TypeError, "tokens must be int64, got torch.float32", tokens=zeros(2, 2, 9)),
    bad("tokens-int32", TypeError, "tokens must be int64, got torch.int", tokens=zeros(2, 2, 9).int()),
    bad("tokens-square", ValueError, r"tokens must hold .* = 16 ids per map, got 9", side=4),
    bad("tokens-rectangle", ValueError, r"tokens must hold .* = 6 ids per map, got 9", side=(3, 2)),
    bad("side-zero", ValueError, "side must be a positive int or two of them, got 0", side=0),
    bad("side-of-three", ValueError, r"side must be .*, got \(3, 3, 1\)", side=(3, 3, 1)),
    bad("side-float", ValueError, "side must be a positive int or two of them, got 3.0", side=3.0),
    bad("size-negative", ValueError, r"size must be .*, got \(5, -5\)", size=(5, -5)),
    bad("size-bool", ValueError, "size must be a positive int or two of them, got True", size=True),
    bad("codebook-rank", ValueError, r"codebook .*\[V, C\].*, got \[7\]", codebook=zeros(7)),
    bad("codebook-empty", ValueError, r"codebook .*at least 1, got \[0, 8\]", codebook=zeros(0, C)),
    bad("codebook-float64", TypeError, "codebook must be .*, got torch.float64", codebook=zeros(7, C).double()),
    bad("codebook-device", ValueError, "codebook must be on .*cpu, got meta", codebook=zeros(7, C, device="meta")),
    bad("f_hat-batch", ValueError, r"f_hat .*\[2, 8, 5, 5\], got \[3, 8, 5, 5\]", f_hat=zeros(3, C, 5, 5)),
    bad("f_hat-width", ValueError, r"f_hat .*\[2, 8, 5, 5\], got \[2, 8, 5, 4\]", f_hat=zeros(2, C, 5, 4)),
    bad("f_hat-rank", ValueError, r"f_hat .*\[2, 8, 5, 5\], got \[2, 8, 25\]", f_hat=zeros(2, C, 25)),
    bad("f_hat-int", TypeError, "f_hat must be floating, got torch.int32", f_hat=zeros(2, C, 5, 5).int()),
    bad("f_hat-device", ValueError, "f_hat must be on .*, got meta", f_hat=zeros(2, C, 5, 5, device="meta")),
    bad("phi-of-two", ValueError, r"phi must be \(weight, bias, blend\) or None, got 2 values", phi=(WEIGHT, BIAS)),
    bad("weight-rank", ValueError, r"phi's weight .*, got \[8, 8, 3\]", phi=(WEIGHT[:, :, 0], BIAS, 0.5)),
    bad("weight-out", ValueError, r"phi's weight .*, got \[4, 8, 3, 3\]", phi=(WEIGHT[:4], BIAS, 0.5)),
    bad("bias-length", ValueError, r"phi's bias must have shape \[8\], got \[4\]", phi=(WEIGHT, BIAS[:4], 0.5)),
    bad("weight-float64", TypeError, "phi's weight must be .*, got torch.float64", phi=(WEIGHT.double(), BIAS, 0.5)),
    bad("bias-device", ValueError, "phi's bias must be on .*, got meta", phi=(WEIGHT, BIAS.to("meta"), 0.5)),
    bad("interpolation", ValueError, "interpolation must be one of .*, got 'lanczos'", interpolation="lanczos"),
    bad("dtype", TypeError, "dtype must be .*, got torch.float64", dtype=torch.float64),
    bad(
        "gradient-codebook",
        RuntimeError,
        "no gradients, but codebook requires",
        codebook=zeros(7, C, requires_grad=True),
    ),
    bad(
        "gradient-f_hat",
        RuntimeError,
        "no gradients, but f_hat requires",
        f_hat=zeros(2, C, 5, 5, requires_grad=True),
    ),
    bad(
        "gradient-weight",
        RuntimeError,
        "no gradients, but phi's weight",
        phi=(WEIGHT.clone().requires_grad_(), BIAS, 0.5),
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input_to_fuse(change, error, message):
    with pytest.raises(error, match=message):
        fuse_tokens(**good(**change))


BAD_COMMIT = [
    bad("tokens-rank", ValueError, r"tokens must have shape \[B, l\], got \[2, 2, 9\]"),
    bad("f_hat-half", TypeError, "f_hat must", tokens=zeros(2, 9).long(), f_hat=zeros(2, C, 5, 5).half()),
    bad("f_hat-batch", ValueError, "f_hat must", tokens=zeros(2, 9).long(), f_hat=zeros(1, C, 5, 5)),
    bad("tokens-length", ValueError, "tokens must hold .* = 9 ids per map, got 8", tokens=zeros(2, 8).long()),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_COMMIT)
def test_bad_input_to_commit(change, error, message):
    given = good(**change)
    del given["size"]
    before = given["f_hat"].clone()
    with pytest.raises(error, match=message):
        commit_tokens(**given)
    assert torch.equal(given["f_hat"], before)


def test_weights_that_require_gradients_are_fine_under_no_grad(device, backend):
    tokens, codebook, f_hat, phi = case(device, SIDE, SIZE, C=C)
    codebook.requires_grad_()
    with torch.no_grad():
        features = fuse_tokens(tokens, codebook, side=SIDE, size=SIZE, f_hat=f_hat, phi=phi)
    assert not features.requires_grad
    commit_tokens(tokens[:, 0], f_hat, codebook.detach(), side=SIDE, phi=phi)


def test_an_id_outside_the_codebook_raises_on_a_cpu():
    with pytest.raises(IndexError):
        fuse_tokens(**good(tokens=torch.full((2, 2, 9), 97)))


def test_tables_are_made_once(device, backend, made):
    tokens, codebook, _, (weight, bias, blend) = case(device, SIDE, SIZE, C=C)
    for _ in range(3):
        # detach() gives another tensor object over the same weights, as model code does at every call
        phi = (weight.detach(), bias.detach(), blend)
        fuse_tokens(tokens, codebook.detach(), side=SIDE, size=SIZE, phi=phi)
        with torch.inference_mode():
            fuse_tokens(tokens, codebook.detach(), side=SIDE, size=SIZE, phi=phi)
    assert len(made) == 1


@pytest.mark.thinned(every=2)
@pytest.mark.parametrize("which", ["codebook", "weight", "bias"])
@pytest.mark.parametrize("side", [SIDE, SIZE], ids=["resized", "unresized"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_tables_follow_the_weights(device, backend, made, which, side, dtype):
    tokens, codebook, f_hat, (weight, bias, blend) = case(device, side, SIZE, C=C)
    phi = (weight, bias, blend)
    fuse_tokens(tokens, codebook, side=side, size=SIZE, f_hat=f_hat, phi=phi, dtype=dtype)
    {"codebook": codebook, "weight": weight, "bias": bias}[which].mul_(-1.5)
    features = fuse_tokens(tokens, codebook, side=side, size=SIZE, f_hat=f_hat, phi=phi, dtype=dtype)
    exact = chain(tokens, codebook, side, SIZE, f_hat, phi)
    assert relative_error(features, exact) < (2e-6 if dtype == torch.float32 else 2e-3)
    assert len(made) == 2


def test_remade_tables_stay_in_place(device, made):
    _, codebook, _, (weight, bias, blend) = case(device, SIDE, SIZE, C=C)
    make = fusion_tables.make_tap_table
    first = fusion_tables.tables_of(make, (torch.float32, blend), codebook, weight, bias)
    addresses, before = [table.data_ptr() for table in first], first[0].clone()
    weight.add_(1)
    second = fusion_tables.tables_of(make, (torch.float32, blend), codebook, weight, bias)
    assert [table.data_ptr() for table in second] == addresses
    assert not torch.equal(second[0], before)


def test_tables_die_with_their_weights(device, made):
    """A new codebook at the address of a freed one, which allocators often reuse, gets tables of its own."""
    make = fusion_tables.make_codebook
    addresses = set()
    for value in range(20):
        codebook = torch.full((64, C), float(value), device=device)
        addresses.add(codebook.data_ptr())
        assert fusion_tables.tables_of(make, (torch.float32, 0.0), codebook)[0].eq(value).all()
        assert len(fusion_tables._cache) <= 2
    assert len(addresses) < 20


def test_weights_without_a_version_counter(device, backend, made):
    with torch.inference_mode():
        tokens, codebook, f_hat, phi = case(device, SIDE, SIZE, C=C)
        for _ in range(2):
            features = fuse_tokens(tokens, codebook, side=SIDE, size=SIZE, f_hat=f_hat, phi=phi)
            assert relative_error(features, chain(tokens, codebook, SIDE, SIZE, f_hat, phi)) < 2e-6
            phi[0].mul_(2)


@pytest.mark.parametrize("side", [SIDE, SIZE], ids=["resized", "unresized"])
def test_opcheck(device, backend, side):
    tokens, codebook, f_hat, (weight, bias, blend) = case(device, side, SIZE, B=1, C=C)
    ops = torch.ops.varkern
    shape = ([side, side], [SIZE, SIZE])
    for rest in (
        (f_hat, weight, bias, blend, *shape, "bicubic", torch.float32, False),
        (None, None, None, 0.0, *shape, "area", torch.bfloat16, True),
    ):
        torch.library.opcheck(ops.fuse_tokens.default, (tokens, codebook, *rest))
    arguments = (tokens[:, 0], f_hat, codebook, weight, bias, blend, shape[0], "bicubic")
    torch.library.opcheck(ops.commit_tokens.default, arguments)


def test_compiles_to_one_graph(device, backend):
    tokens, codebook, f_hat, phi = case(device, SIDE, SIZE, C=C)

    def step(tokens, f_hat):
        features = fuse_tokens(tokens, codebook, side=SIDE, size=SIZE, f_hat=f_hat, phi=phi)
        best = features.mean(dim=(2, 3, 4)).argmax(1)
        kept = tokens.take_along_dim(best[:, None, None], 1)[:, 0]
        commit_tokens(kept, f_hat, codebook, side=SIDE, phi=phi)
        return features * 2

    compiled = torch.compile(step, fullgraph=True, backend="inductor" if device.type == "cuda" else "aot_eager")
    given, expected = f_hat.clone(), f_hat.clone()
    features, wanted = compiled(tokens, given), step(tokens, expected)
    torch.testing.assert_close(features, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(given, f_hat)


def capture(step):
    """A CUDA graph of ``step``, after the warm-up on a side stream that capturing asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs exist on GPUs only")
@pytest.mark.parametrize("warm", [True, False], ids=["tables-there", "tables-missing"])
@pytest.mark.parametrize("side", [SIDE, SIZE], ids=["resized", "unresized"])
def test_cuda_graph(made, warm, side):
    tokens, codebook, f_hat, phi = case("cuda", side, SIZE, C=C)
    out = torch.empty(2, 2, C, SIZE, SIZE, device="cuda")
    given = f_hat.clone()

    def step():
        if not warm and torch.cuda.is_current_stream_capturing():
            fusion_tables.clear_tables()
        out.copy_(fuse_tokens(tokens, codebook, side=side, size=SIZE, f_hat=given, phi=phi))
        commit_tokens(tokens[:, 1], given, codebook, side=side, phi=phi)

    with use_backend("triton"):
        graph = capture(step)
    for round_ in range(2):
        tokens.copy_(case("cuda", side, SIZE, C=C, seed=round_ + 1)[0])
        given.copy_(f_hat)
        out.fill_(torch.nan)
        graph.replay()
        exact = chain(tokens, codebook, side, SIZE, f_hat, phi)
        assert relative_error(out, exact) < 2e-6
        assert relative_error(given, exact[:, 1]) < 2e-6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="measures a GPU's allocator")
def test_peak_memory_of_a_thousand_candidates():
    """24 images, M = 1024, the latent of 256 px: under 1 GiB, and no memory apart from the result."""
    for side in (13, 16):
        tokens, codebook, f_hat, phi = case("cuda", side, 16, B=24, M=1024, V=4096)
        with use_backend("triton"):
            fuse_tokens(tokens[:1, :1], codebook, side=side, size=16, f_hat=f_hat[:1], phi=phi, dtype=torch.bfloat16)
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            features = fuse_tokens(tokens, codebook, side=side, size=16, f_hat=f_hat, phi=phi, dtype=torch.bfloat16)
        grown = torch.cuda.max_memory_allocated() - before
        assert grown < features.numel() * 2 + (1 << 20) < 2**30
