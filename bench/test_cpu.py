"""The PyTorch form of every op on a CPU, and a calibration. Continuous integration compares them to find regressions.

    python -m pytest bench/test_cpu.py -q --benchmark-json=NEW.json
    python -m bench.compare bench/results/cpu/ops.json NEW.json

The sizes are those of a published VAR at one scale in the middle, with two images, so each call takes a few
milliseconds. Compare the figures only with other runs on a CPU.
"""

import pytest
import torch

from tests.references.fusion import case
from varkern.ops import commit_tokens, fuse_tokens, image_seeds, map_norm, resize_features, sample_tokens
from varkern.ops import token_density as density
from varkern.ops.backend import use_backend

B, M, SIDE, SIZE, V, C = 2, 4, 8, 16, 4096, 32
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread():
    """Use one thread: on a shared machine, other cores are not always free."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad(), use_backend("torch"):
        yield
    torch.set_num_threads(threads)


def timed(benchmark, step):
    benchmark.pedantic(step, rounds=20, warmup_rounds=3)


def test_calibration(benchmark):
    """A matrix product, a sort and a pass over memory, all by PyTorch."""
    a, b = torch.randn(384, 384), torch.randn(2**18)
    timed(benchmark, lambda: (a @ a, b.sort(), b.add(1).exp()))


@pytest.mark.parametrize("m", [1, 64])
def test_sample_tokens(benchmark, m):
    generator = torch.Generator().manual_seed(0)
    cond, uncond = torch.randn(2, B, SIDE * SIDE, V, generator=generator) * 2.5
    seeds = image_seeds(0, B)
    options = {"uncond_logits": uncond, "guidance": 1.5, "top_k": 900, "top_p": 0.96, "seeds": seeds}
    timed(benchmark, lambda: sample_tokens(cond, m, **options))


def test_fuse_tokens(benchmark):
    tokens, codebook, f_hat, phi = case(CPU, SIDE, SIZE, B=B, M=M, V=V, C=C)
    timed(benchmark, lambda: fuse_tokens(tokens, codebook, side=SIDE, size=SIZE, f_hat=f_hat, phi=phi))


def test_commit_and_resize(benchmark):
    tokens, codebook, f_hat, phi = case(CPU, SIDE, SIZE, B=B, M=1, V=V, C=C)

    def step():
        commit_tokens(tokens[:, 0], f_hat, codebook, side=SIDE, phi=phi)
        return resize_features(f_hat, size=10)

    timed(benchmark, step)


@pytest.mark.parametrize("per", ["position", "map"])
def test_token_density(benchmark, per):
    tokens, codebook, _, _ = case(CPU, 2, SIZE, B=B, M=100, V=V, C=C)
    timed(benchmark, lambda: density(tokens, codebook, per=per))


def test_map_norm(benchmark):
    x, residual = torch.randn(2, 2 * M, 64, 8, 8)
    weight, bias = torch.randn(2, 64, 8, 8)
    timed(benchmark, lambda: map_norm(x, weight, bias, residual=residual, negative_slope=0.2))
