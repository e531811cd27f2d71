"""``sample_tokens`` against a float64 form, on both backends: which tokens survive, and which are drawn."""

import math

import numpy as np
import pytest
import torch

from varkern.ops.backend import use_backend
from varkern.ops.philox import image_seeds, uniforms
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
    """Kept tokens of one row of float32 logits, their probabilities in float64, and how near top_p any mass came."""
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
        margin = np.abs(before - top_p).min()
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
    """Check every draw and every count against the float64 form; return (draws too near a boundary to tell, draws)."""
    tokens, stats = sample_tokens(
        logits,
        num_candidates,
        uncond_logits=uncond_logits,
        guidance=guidance,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seeds=seeds,
        scale=scale,
        return_stats=True,
    )
    batch, length, vocab = logits.shape
    assert tokens.shape == (batch, num_candidates, length) and tokens.dtype == torch.int64
    assert stats.log_prob.shape == stats.raw_log_prob.shape == tokens.shape
    assert stats.num_kept.shape == (batch, length)
    assert tokens.numel() == 0 or (tokens.min() >= 0 and tokens.max() < vocab)
    strengths = guidance.float().cpu().numpy() if isinstance(guidance, torch.Tensor) else guidance
    rows = guided(logits, uncond_logits, strengths, temperature)
    u = uniforms(seeds.cpu(), num_candidates, length, scale).double().numpy()
    tokens, log_prob, raw_log_prob, num_kept = (t.cpu().numpy() for t in (tokens, *stats))
    unclear = 0
    for b, position in np.ndindex(batch, length):
        kept, probs, margin = reference_row(rows[b, position], top_k, top_p)
        drawn = tokens[b, :, position]
        if not kept.any():
            assert (drawn == 0).all() and num_kept[b, position] == 0 and np.isnan(log_prob[b, :, position]).all()
            continue
        if margin < TOLERANCE / 10:
            unclear += num_candidates
            continue
        assert num_kept[b, position] == kept.sum()
        assert kept[drawn].all()
        cdf = np.cumsum(probs)
        wanted = np.minimum(np.searchsorted(cdf, u[b, :, position], side="right"), np.flatnonzero(kept).max())
        differs = wanted != drawn
        nearest = np.abs(cdf[:, None] - u[b, None, :, position]).min(0)
        assert (nearest[differs] < TOLERANCE).all(), (b, position, drawn[differs], wanted[differs])
        unclear += differs.sum()
        assert np.allclose(log_prob[b, :, position], np.log(probs[drawn]), atol=2e-5, rtol=2e-6)
        raw = reference_row(rows[b, position], 0, 0.0)[1]
        assert np.allclose(raw_log_prob[b, :, position], np.log(raw[drawn]), atol=2e-5, rtol=2e-6)
    return unclear, tokens.size


def rows_of(kind, batch, length, vocab, seed=0):
    """Logits of every temper: what a trained model gives, and what it must never give."""
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


KINDS = (
    "random", "flat", "peaked", "masked", "equal", "zeros of both signs", "one finite", "huge", "tied", "tiny", "spread",
)  # fmt: skip
FILTERS = {"off": (0, 0.0), "k": (90, 0.0), "p": (0, 0.9), "k and p": (90, 0.95), "one": (1, 0.5)}


@pytest.mark.parametrize("top_k, top_p", FILTERS.values(), ids=FILTERS)
@pytest.mark.parametrize("kind", KINDS)
def test_any_logits(kind, top_k, top_p, backend, place):
    logits = rows_of(kind, 2, 2, 507).to(place)
    unclear, draws = compare(logits, 3, image_seeds(1, 2, place), top_k=top_k, top_p=top_p, scale=2)
    assert unclear == 0
