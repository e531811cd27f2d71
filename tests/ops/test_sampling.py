"""``sample_tokens`` against a float64 form, on both backends: which tokens are kept, and which are drawn."""

import math

import numpy as np
import pytest
import torch

from varkern.ops.backend import use_backend
from varkern.ops.philox import image_seeds, uniform_bits, uniforms
from varkern.ops.sampling import sample_tokens

TOLERANCE = 1e-6  # a float32 exponential cannot place a boundary of the float64 CDF closer than this


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    with use_backend(request.param):
        yield request.param


@pytest.fixture
def place(backend, device):
    """Where the backend's tensors live: the plain form is tested on the CPU, the kernels wherever they run."""
    return device if backend == "triton" else torch.device("cpu")


def reference_row(x, top_k, top_p):
    """Kept tokens of one row of float32 logits, their float64 probabilities, and the distance of any mass to top_p."""
    x = np.where(np.isnan(x), -np.inf, np.minimum(x, np.finfo(np.float32).max)).astype(np.float64)
    if x.max() == -np.inf:
        return np.zeros(len(x), bool), np.zeros(len(x)), 1.0
    kept = x > -np.inf
    if 0 < top_k < len(x):
        kept &= x >= np.sort(x)[-top_k]
    weights = np.where(kept, np.exp(x - x.max()), 0.0)
    margin = 1.0
    if 0 < top_p < 1:
        order = np.argsort(-x, kind="stable")
        before = np.concatenate([[0.0], np.cumsum(weights[order])[:-1]]) / math.fsum(weights)
        inside = before < top_p
        inside[0] = True
        gaps = np.abs(before - top_p)
        margin = gaps[gaps > 0].min()  # a mass of exactly top_p, as equal weights give, is no matter of rounding
        kept[order[~inside]] = False
        weights = np.where(kept, weights, 0.0)
    return kept, weights / math.fsum(weights), margin


def guided(logits, uncond_logits, guidance, temperature):
    """The float32 logits of the contract, op by op in NumPy, which contracts nothing."""
    x = logits.float().cpu().numpy()
    if uncond_logits is not None:
        t = np.broadcast_to(np.asarray(guidance, dtype=np.float32).reshape(-1, 1, 1), (x.shape[0], 1, 1))
        with np.errstate(invalid="ignore"):
            x = (np.float32(1) + t) * x - t * uncond_logits.float().cpu().numpy()
    return x if temperature == 1 else x * np.float32(1 / temperature)


def compare(
    logits, num_candidates, seeds, uncond_logits=None, guidance=0.0, temperature=1.0, top_k=0, top_p=0.0, scale=0
):
    """Check every draw against the float64 form; return (draws too near a boundary to be checked, all draws)."""
    tokens = sample_tokens(
        logits,
        num_candidates,
        uncond_logits=uncond_logits,
        guidance=guidance,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seeds=seeds,
        scale=scale,
    )
    batch, length, vocab = logits.shape
    assert tokens.shape == (batch, num_candidates, length) and tokens.dtype == torch.int64
    assert tokens.numel() == 0 or (tokens.min() >= 0 and tokens.max() < vocab)
    strengths = guidance.float().cpu().numpy() if isinstance(guidance, torch.Tensor) else guidance
    rows = guided(logits, uncond_logits, strengths, temperature)
    u = uniforms(seeds.cpu(), num_candidates, length, scale).double().numpy()
    tokens = tokens.cpu().numpy()
    unclear = 0
    for b, position in np.ndindex(batch, length):
        kept, probs, margin = reference_row(rows[b, position], top_k, top_p)
        drawn = tokens[b, :, position]
        if not kept.any():
            assert (drawn == 0).all()
            continue
        if margin < TOLERANCE / 10:
            unclear += num_candidates
            continue
        assert kept[drawn].all()
        cdf = np.cumsum(probs)
        wanted = np.minimum(np.searchsorted(cdf, u[b, :, position], side="right"), np.flatnonzero(kept).max())
        differs = wanted != drawn
        nearest = np.abs(cdf[:, None] - u[b, None, :, position]).min(0)
        assert (nearest[differs] < TOLERANCE).all(), (b, position, drawn[differs], wanted[differs])
        unclear += differs.sum()
    return unclear, tokens.size


def rows_of(kind, batch, length, vocab, seed=0):
    """Logits of many kinds: those of a trained model, and values that a model should never give."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, length, vocab, generator=generator)
    match kind:
        case "random":
            return x * 2
        case "flat":
            return x * 0.01
        case "peaked":
            return x * 30
        case "masked":
            return torch.where(torch.rand(x.shape, generator=generator) < 0.7, -math.inf, x * 2)
        case "equal":
            return torch.full_like(x, -3.25)
        case "zeros of both signs":
            return torch.where(x > 0, 0.0, -0.0)
        case "one finite":
            return torch.full_like(x, -math.inf).index_fill_(2, torch.tensor([vocab // 2]), 1.5)
        case "huge":
            return torch.where(x > 0, 1e4, -1e4) + x
        case "tied":
            return (x * 2).round()
        case "tiny":
            return x * 1e-39
        case "spread":
            return x.sign() * 10.0 ** (x.abs() * 12 - 20)


KINDS = ("random", "flat", "peaked", "masked", "equal", "zeros of both signs", "one finite", "huge", "tied", "tiny")
KINDS += ("spread",)
FILTERS = {"off": (0, 0.0), "k": (90, 0.0), "p": (0, 0.9), "k and p": (90, 0.95), "one": (1, 0.5), "half": (300, 0.9)}


@pytest.mark.thinned(every=3)
@pytest.mark.parametrize("top_k, top_p", FILTERS.values(), ids=FILTERS)
@pytest.mark.parametrize("kind", KINDS)
def test_any_logits(kind, top_k, top_p, backend, place):
    logits = rows_of(kind, 1, 2, 507).to(place)
    unclear, _ = compare(logits, 3, image_seeds(1, 1, place), top_k=top_k, top_p=top_p, scale=2)
    assert unclear == 0


@pytest.mark.thinned(every=3)
@pytest.mark.parametrize("kind", ["random", "tied", "masked"])
@pytest.mark.parametrize("vocab", [1, 2, 3, 31, 33, 252, 4096, 8912])
def test_any_vocabulary(vocab, kind, backend, place):
    length = 1 if vocab > 1000 and backend == "triton" else 5
    logits = rows_of(kind, 2, length, vocab).to(place)[:1]
    unclear, draws = compare(logits, 5, image_seeds(2, 1, place), top_k=max(1, vocab // 3), top_p=0.9)
    print(f"{unclear} of {draws} draws lay too near a boundary to tell")
    assert unclear <= draws * 1e-4


@pytest.mark.thinned(vocab=(20000,))
@pytest.mark.parametrize("vocab, top_k, top_p", [(20000, 900, 0.96), (2**18, 900, 0.0)], ids=["20000", "262144"])
def test_rows_that_no_program_holds(vocab, top_k, top_p, backend, place):
    # Two draws of the kernel are enough, because the plain form draws the same and is compared with float64.
    logits = rows_of("random", 1, 1, vocab)
    seeds = image_seeds(2, 1)
    options = {"top_k": top_k, "top_p": top_p}
    if backend == "torch":
        unclear, draws = compare(logits, 256, seeds, **options)
        assert unclear <= draws * 1e-4
    with use_backend("torch"):
        plain = sample_tokens(logits, 2, seeds=seeds, **options)
    assert torch.equal(sample_tokens(logits.to(place), 2, seeds=seeds.to(place), **options).cpu(), plain)


@pytest.mark.thinned(every=2)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
def test_guidance_dtypes_and_strides(dtype, strided, backend, place):
    both = rows_of("random", 6, 2, 2 * 301 if strided else 301).to(place, dtype)
    both = both[..., ::2] if strided else both
    cond, uncond = both[::3], both.flip(0)[::3].transpose(0, 1).contiguous().transpose(0, 1)
    strengths = torch.tensor([0.7, 4.0], device=place)
    common = {"seeds": image_seeds(5, 2, place), "uncond_logits": uncond, "temperature": 0.8, "top_p": 0.9}
    for guidance in (1.5, strengths, strengths.view(2, 1, 1)):
        unclear, _ = compare(cond, 2, guidance=guidance, top_k=90, **common)
        assert unclear == 0


@pytest.mark.parametrize("images, far", [(1, 2**31 + 16), (4, 2**30 + 16)], ids=["a stride", "a product"])
def test_a_row_beyond_2_31_elements(images, far, backend, place):
    """Also for a stride that fits into 32 bits when three times the stride does not."""
    # The memory between the rows is never touched, so it costs address space and no more.
    vocab, rows = 300, max(images, 2)
    if place.type == "cuda" and torch.cuda.mem_get_info()[0] < 8e9:
        pytest.skip("needs 7 GB of GPU memory")
    storage = torch.empty((rows - 1) * far + vocab, dtype=torch.bfloat16, device=place)
    strides = (0, far, 1) if images == 1 else (far, 0, 1)
    logits = storage.as_strided((images, rows // images, vocab), strides)
    logits.copy_(rows_of("random", images, rows // images, vocab))
    unclear, _ = compare(logits, 2, image_seeds(0, images, place), top_k=20, top_p=0.9)
    assert unclear == 0


@pytest.mark.parametrize("shape", [(0, 3, 40), (2, 0, 40), (0, 4, 5000)], ids=str)
def test_nothing_to_draw(shape, backend, place):
    seeds = image_seeds(0, shape[0], place)
    tokens = sample_tokens(torch.empty(shape, device=place), 3, top_k=9, top_p=0.5, seeds=seeds)
    assert tokens.shape == (shape[0], 3, shape[1])


@pytest.mark.parametrize("vocab", [7, 300])
def test_the_backends_draw_the_same_tokens(vocab, device):
    # Weights and sums are integers made by the same roundings, so there is no draw near a boundary to forgive.
    logits = rows_of("random", 2, 8, vocab)
    seeds = image_seeds(9, 2)
    options = {"guidance": 1.5, "temperature": 1.1, "top_k": vocab // 2, "top_p": 0.93}
    cond, uncond = logits.split(4, 1)
    tokens = sample_tokens(cond, 20, uncond_logits=uncond, seeds=seeds, **options)
    cond, uncond, there = (t.to(device) for t in (cond, uncond, seeds))
    with use_backend("triton"):
        same = sample_tokens(cond, 20, uncond_logits=uncond, seeds=there, **options)
    assert torch.equal(same.cpu(), tokens)


def test_nesting_and_batch_invariance(backend, place):
    logits = rows_of("random", 3, 2, 100).to(place)
    seeds = image_seeds(3, 3, place)
    options = {"top_k": 50, "top_p": 0.9, "scale": 5}
    eight = sample_tokens(logits, 8, seeds=seeds, **options)
    for m in (1, 4, 5):
        assert torch.equal(sample_tokens(logits, m, seeds=seeds, **options), eight[:, :m])
    order = torch.tensor([2, 0], device=place)
    assert torch.equal(sample_tokens(logits[order], 8, seeds=seeds[order], **options), eight[order])


def test_a_seed_and_a_scale_change_the_draws(backend, place):
    logits = rows_of("flat", 1, 5, 40).to(place)
    draws = [sample_tokens(logits, 4, seeds=image_seeds(g, 1, place), scale=k) for g, k in ((0, 0), (1, 0), (0, 1))]
    assert not any(torch.equal(draws[i], draws[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


BAD_ROWS = {"nan": math.nan, "all -inf": -math.inf, "inf": math.inf}


@pytest.mark.parametrize("vocab", [5, 100, 2100])
@pytest.mark.parametrize("value", BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_token_is_in_range_whatever_the_logits_hold(value, vocab, backend, place):
    logits = rows_of("random", 1, 2, vocab)
    logits[0, 1] = value
    logits[0, 0, :3] = value
    unclear, _ = compare(logits.to(place), 2, image_seeds(0, 1, place), top_k=3, top_p=0.9)
    assert unclear == 0


def call(**changes):
    logits = torch.zeros(2, 3, 40)
    arguments = {"logits": logits, "seeds": image_seeds(0, 2), "uncond_logits": logits, "guidance": 1.0, **changes}
    return sample_tokens(**arguments)


BAD_INPUT = [
    ({"num_candidates": 0}, ValueError, "num_candidates must be >= 1, got 0"),
    ({"num_candidates": 1.5}, TypeError, "num_candidates must be an int, got float"),
    ({"top_k": -1}, ValueError, "top_k must be >= 0, got -1"),
    ({"top_p": 1.01}, ValueError, r"top_p must be in \[0, 1\], got 1.01"),
    ({"top_p": math.nan}, ValueError, r"top_p must be in \[0, 1\], got nan"),
    ({"top_p": "0.9"}, TypeError, "top_p must be a number, got str"),
    ({"temperature": None}, TypeError, "temperature must be a number, got NoneType"),
    ({"guidance": "1"}, TypeError, "guidance must be a number, got str"),
    ({"temperature": 0}, ValueError, "temperature must be finite and >= 1e-30, got 0"),
    ({"temperature": math.inf}, ValueError, "temperature must be finite"),
    ({"scale": -1}, ValueError, "scale must be >= 0, got -1"),
    ({"logits": [1.0]}, TypeError, "logits must be a tensor, got list"),
    ({"logits": torch.zeros(2, 3, 4).long()}, TypeError, "logits must be float32, .*, got torch.int64"),
    ({"logits": torch.zeros(2, 3)}, ValueError, r"logits must have shape \[B, l, V\], got \[2, 3\]"),
    ({"logits": torch.zeros(2, 3, 0)}, ValueError, r"last dimension V in \[1, 262144\], got 0"),
    ({"uncond_logits": torch.zeros(2, 3, 41)}, ValueError, "uncond_logits must have the shape of logits"),
    ({"uncond_logits": torch.zeros(2, 3, 40, device="meta")}, ValueError, "uncond_logits must have the device"),
    ({"uncond_logits": None}, ValueError, "uncond_logits must be given when guidance is 1.0, got None"),
    ({"guidance": math.nan}, ValueError, "guidance must be finite, got nan"),
    ({"guidance": torch.ones(3)}, ValueError, r"guidance must have shape \[2\] or \[2, 1, 1\], got \[3\]"),
    ({"guidance": torch.ones(2).int()}, TypeError, "guidance must be a float tensor, got torch.int32"),
    ({"seeds": 5}, TypeError, "seeds must be an int64 tensor, got int"),
    ({"seeds": torch.zeros(3).long()}, ValueError, r"seeds must have shape \[2\], got \[3\]"),
    ({"seeds": torch.zeros(2).long().to("meta")}, ValueError, "seeds must be on cpu, got meta"),
]


@pytest.mark.parametrize(
    "changes, error, message", BAD_INPUT, ids=[f"{next(iter(c))}-{i}" for i, (c, *_) in enumerate(BAD_INPUT)]
)
def test_bad_input_names_the_argument(changes, error, message):
    with pytest.raises(error, match=message):
        call(**changes)


def seeds_on_the_grid(step, scale=0):
    """Seeds whose first draw is a multiple of ``step``·2^-24, and that draw's number."""
    seeds = torch.arange(2**20) * 7919
    bits = uniform_bits(seeds, 1, 1, scale)[:, 0, 0]
    chosen = (bits % step == 0).nonzero()[:3, 0]
    assert len(chosen)
    return seeds[chosen], bits[chosen]


@pytest.mark.parametrize(
    "vocab, kept, top_k",
    [(8192, 8192, 0), (256, 256, 0), (4096, 64, 64), (32, 32, 0), (512, 512, 5)],
    ids=["row", "short row", "shortlist", "all pairs", "shortlist overflows"],
)
def test_a_draw_on_a_boundary_takes_the_token_after_it(vocab, kept, top_k, backend, place):
    # Equal weights put the boundaries on the uniform numbers' grid: u = n/V must give token n, never n − 1.
    logits = torch.full((vocab,), -7.0)
    logits[:kept] = 2.5
    seeds, bits = seeds_on_the_grid(2**24 // kept)
    rows = logits.expand(len(seeds), 1, vocab).to(place)
    tokens = sample_tokens(rows, top_k=top_k, seeds=seeds.to(place))
    assert tokens.flatten().tolist() == (bits // (2**24 // kept)).tolist()
