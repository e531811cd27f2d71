"""Tests of compiled kernels: results against float64, faults and counts. They run with ``--compiled``."""

import math

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from tests import emulator

pytestmark = pytest.mark.compiled_only


@triton.jit
def add_kernel(x, y, o, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(o + i, tl.load(x + i, mask=i < n) + tl.load(y + i, mask=i < n), mask=i < n)


@triton.jit
def unmasked_kernel(x, o, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(o + i, tl.load(x + i) * 2)


@triton.jit
def reductions_kernel(x, o, n, B: tl.constexpr):
    i = tl.arange(0, B)
    v = tl.load(x + i, mask=i < n, other=0.0)
    tl.store(o, tl.sum(v))
    tl.store(o + 1, tl.max(v))
    tl.store(o + 2 + i, tl.cumsum(v, 0), mask=i < n)


@triton.jit
def product_kernel(a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BK: tl.constexpr):
    i, j = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :]
    sums = tl.zeros((M, N), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        sums = tl.dot(tl.load(a + i * K + k[None, :]), tl.load(b + k[:, None] * N + j), sums, input_precision="ieee")
    tl.store(c + i * N + j, sums)


@triton.jit
def halve_kernel(x, o, B: tl.constexpr):
    v = tl.load(x + tl.program_id(0) * B + tl.arange(0, B))
    steps = 0
    while tl.sum(v) > 1.0:
        v = v * 0.5
        steps += 1
    tl.store(o + tl.program_id(0), steps)


@triton.jit
def integers_kernel(x, y, o, B: tl.constexpr):
    i = tl.arange(0, B)
    a, b = tl.load(x + i), tl.load(y + i)
    high = tl.umulhi(a.to(tl.uint32, bitcast=True), b.to(tl.uint32, bitcast=True))
    tl.store(o + i, a // b)
    tl.store(o + B + i, a % b)
    tl.store(o + 2 * B + i, (a.to(tl.int64) * b.to(tl.int64) >> 7).to(tl.int32))
    tl.store(o + 3 * B + i, high.to(tl.int32, bitcast=True))


@triton.jit
def between_programs_kernel(x, n):
    tl.store(x + tl.program_id(0) + 1, tl.load(x + tl.program_id(0)) + 1)


@triton.jit
def convert_kernel(x, o, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(o + i, tl.load(x + i).to(o.dtype.element_ty))


@triton.jit
def exponential_kernel(x, o, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(o + i, tl.exp2(tl.load(x + i)))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def launches():
    """What is launched during a test: the totals of its kernel, once for each launch. The run's table lists none."""
    seen = []
    emulator.listeners.append(seen.append)
    yield seen
    emulator.listeners.remove(seen.append)
    for totals in seen:
        totals.reset()


def test_addition_of_a_length_that_no_block_divides():
    x, y, o = normal(1000), normal(1000, seed=1), torch.zeros(1000)
    add_kernel[(4,)](x, y, o, 1000, B=256)
    assert torch.equal(o, x + y)


@pytest.mark.parametrize("num_warps", [1, 4, 8])
def test_reductions_and_scans(num_warps):
    x, o = normal(1000), torch.zeros(1002)
    reductions_kernel[(1,)](x, o, 1000, B=1024, num_warps=num_warps)
    exact = x.double()
    assert abs(o[0] - exact.sum()) < 1e-4 and o[1] == x.max()
    assert (o[2:] - exact.cumsum(0)).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "sizes", [(16, 16, 32, 16, 1), (64, 32, 128, 32, 4), (128, 64, 96, 16, 8), (32, 64, 64, 64, 4)]
)
def test_products_on_the_matrix_units(sizes, dtype, launches, request):
    """On sm_90 tiles of 64 rows and more go through wgmma, smaller ones and sm_80 through mma; float32 through fma."""
    M, N, K, BK, num_warps = sizes
    a, b, c = normal(M, K).to(dtype), normal(K, N, seed=1).to(dtype), torch.zeros(M, N)
    product_kernel[(1,)](a, b, c, M, N, K, BK, num_warps=num_warps)
    assert (c.double() - a.double() @ b.double()).abs().max() < 1e-4
    wide = request.config.getoption("--compiled") == "sm_90" and M >= 64
    unit = "fma.rn.f32" if dtype == torch.float32 else "wgmma.mma_async" if wide else "mma.sync"
    assert [name for name in ("wgmma.mma_async", "mma.sync", "fma.rn.f32") if name in launches[0].ptx][:1] == [unit]


def test_a_loop_whose_length_the_data_decide():
    x = torch.rand(7, 512, generator=torch.Generator().manual_seed(0))
    x *= torch.tensor([1e-4, 1, 10, 1e3, 1e-9, 1e6, 0.5])[:, None]
    steps = torch.zeros(7, dtype=torch.int32)
    halve_kernel[(7,)](x, steps, B=512, num_warps=4)
    assert steps.tolist() == [max(0, math.ceil(math.log2(float(row.double().sum())))) for row in x]


def test_integer_arithmetic():
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-(2**31), 2**31 - 1, (256,), generator=generator)
    b = torch.randint(1, 100000, (256,), generator=generator)
    o = torch.zeros(4, 256, dtype=torch.int32)
    integers_kernel[(1,)](a.int(), b.int(), o, B=256)
    quotient = torch.div(a, b, rounding_mode="trunc")
    high = (a & 0xFFFFFFFF) * b >> 32
    wanted = torch.stack([quotient, a - quotient * b, a * b >> 7, high]).int()
    assert torch.equal(o, wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int32])
def test_conversions(dtype):
    special = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 65520.0, 1e-6])
    x = normal(256) * 1e3
    if dtype.is_floating_point:
        x[:6] = special
    o = torch.zeros(256, dtype=dtype)
    convert_kernel[(1,)](x, o, B=256)
    assert torch.equal(o.nan_to_num(7), x.to(dtype).nan_to_num(7))


def test_a_load_beyond_a_tensor():
    with pytest.raises(emulator.EmulationError, match="out of bounds"):
        unmasked_kernel[(4,)](torch.zeros(1000), torch.zeros(1000), B=256)


def test_a_load_beyond_a_view_of_a_longer_storage():
    whole = torch.zeros(3000)
    with pytest.raises(emulator.EmulationError, match="out of bounds"):
        unmasked_kernel[(4,)](whole[1000:2000], whole[:1000], B=256)


def test_a_race_between_programs():
    with pytest.raises(emulator.EmulationError, match="between CTAs"):
        between_programs_kernel[(5,)](torch.zeros(8, dtype=torch.int32), 5)


def test_new_memory_is_poisoned():
    assert torch.empty(5).isnan().all() and torch.empty_like(torch.zeros(3)).isnan().all()
    assert torch.zeros(2).new_empty(4).isnan().all()


@pytest.mark.parametrize("ulp", [0, 1, 2])
def test_approximate_instructions_err_by_so_many_ulp(ulp, monkeypatch):
    monkeypatch.setattr(emulator.SETTINGS, "ulp", ulp)
    x, o = normal(256) * 5, torch.zeros(256)
    x[0] = 3.0
    exponential_kernel[(1,)](x, o, B=256)
    nearest = torch.exp2(x.double()).float()
    steps = (o.view(torch.int32) - nearest.view(torch.int32)).abs()
    assert steps.max() == ulp and o[0] == 8.0  # exact results stay


def test_a_launch_that_is_only_recorded(monkeypatch, launches):
    monkeypatch.setattr(emulator.SETTINGS, "run", False)
    x, o = normal(1000), torch.zeros(1000)
    for blocks in (4, 2, 4):
        add_kernel[(blocks,)](x, x, o, 1, B=512, num_warps=2)
    (recorded,) = {id(totals): totals for totals in launches}.values()
    assert recorded.name == "add_kernel" and recorded.grids == {(4, 1, 1): 2, (2, 1, 1): 1} and not o.any()
    assert recorded.signature == {"x": "*fp32", "y": "*fp32", "o": "*fp32"}
    assert recorded.constants == {"n": 1, "B": 512} and recorded.options["num_warps"] == 2
    assert ".target sm_" in recorded.ptx
    with emulator.machine_code():
        target = GPUTarget("cuda", 90, 32)
        assembled = triton.compile(recorded.source, target=target, options=recorded.options)
    assert assembled.asm["cubin"].startswith(b"\x7fELF") and ".target sm_90" in assembled.asm["ptx"]
    assert len(launches) == 3


def test_counts_of_a_known_kernel(launches):
    """256 threads in 8 warps: each load or store of 4 bytes per thread takes 4 sectors per warp."""
    x, o = torch.zeros(1024), torch.zeros(1024)
    add_kernel[(1,)](x, x, o, 1024, B=1024, num_warps=8)
    counts = emulator.summarise(launches[0])
    assert (counts["loads"], counts["stores"]) == (2 * 8, 8)
    assert (counts["load_bytes"], 32 * counts["load_sectors"]) == (2 * 4096, 2 * 4096)
    assert (counts["store_bytes"], counts["bytes_written"], counts["bytes_read"]) == (4096, 4096, 4096)
