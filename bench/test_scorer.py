"""The scorer of ImageNet's size: forward of 3,072 maps, a training step, and the fused norm.

    python -m pytest bench/test_scorer.py -q -s       # prints the tables; about two minutes on one GPU
    VARKERN_BENCH_TINY=1 ...                          # a rehearsal of a few small maps in the interpreter

3,072 maps are M=128 of 24 images, [3072, 32, 16, 16] bfloat16 channels-last; the bar is 2 ms on an H200. A training
step is forward and backward of the pairwise loss, 128 pairs at ten scales, float32 weights under bfloat16 autocast. The
peers are PyTorch's layers (``nn.LayerNorm``), eager and under ``torch.compile``. Forward times are those of CUDA
graphs, without launches; training steps are plain calls. The floor of a convolution is the larger of operations / rate
of the matrix units and bytes / bandwidth; that of a norm is bytes / bandwidth.
"""

import copy
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
TINY = os.environ.get("VARKERN_BENCH_TINY", "0") == "1"
if TINY and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from bench.measure import call_seconds, device_name, graph_seconds, rates_of, synchronize  # noqa: E402
from bench.roofline import Part, counting  # noqa: E402
from tests.references.norm import eager_norm, exact_norm  # noqa: E402
from tests.references.scorer import eager_scores  # noqa: E402
from varkern import Scorer, ScorerConfig  # noqa: E402
from varkern.ops import map_norm  # noqa: E402
from varkern.scorer import stage_sides  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CONFIG = ScorerConfig(5, 3, 4, 4, widths=(8,), embedding=4, hidden=(4,)) if TINY else ScorerConfig()
IMAGES, CANDIDATES = (2, 2) if TINY else (24, 128)
PAIRS = 1 if TINY else 128
BAR = 2e-3
HALF = torch.bfloat16


map_norm_backward = torch.ops.varkern.map_norm_backward


def peak():
    rates = rates_of(DEVICE)
    return (rates.bandwidth, rates.half) if rates else (float("nan"), float("nan"))


def case(images, candidates, dtype=HALF):
    """(scorer with random weights, labels, features) on the device."""
    torch.manual_seed(0)
    scorer = Scorer(CONFIG).to(DEVICE, dtype).eval().requires_grad_(False)
    features = torch.randn(images, candidates, CONFIG.size, CONFIG.size, CONFIG.channels, device=DEVICE).to(dtype)
    return scorer, torch.arange(images, device=DEVICE) % CONFIG.num_classes, features.permute(0, 1, 4, 2, 3)


def plain(scorer, labels, features, scale):
    """Scores ``[B, M]`` by PyTorch's layers with the same weights."""
    scores = eager_scores(scorer, labels.repeat_interleave(features.shape[1]), features.flatten(0, 1), scale)
    return scores.view(features.shape[:2])


def compile_peer(function):
    """{"compiled": ``function`` under torch.compile}; empty without a GPU."""
    torch._dynamo.reset()
    return {"compiled": torch.compile(function)} if DEVICE.type == "cuda" else {}


def operations(maps):
    """Operations of the convolutions and the MLP in a forward pass."""
    part = Part()
    with counting(part):
        Scorer(CONFIG).to("meta")(
            torch.empty(maps, dtype=torch.int64, device="meta"),
            torch.empty(maps, 1, CONFIG.channels, CONFIG.size, CONFIG.size, device="meta"),
            0,
        )
    return part.operations


def print_times(title, times, count):
    rate = peak()[1]
    print(f"\n{title}, {device_name(DEVICE)}, torch {torch.__version__}")
    print(f"{'':>10} {'ms':>9} {'TFLOP/s':>8} of peak   x ours")
    for name, seconds in times.items():
        speed = count / seconds
        print(f"{name:>10} {seconds * 1e3:9.3f} {speed / 1e12:8.1f} {speed / rate:7.1%} {seconds / times['ours']:8.2f}")


def test_forward(benchmark):
    scorer, labels, features = case(IMAGES, CANDIDATES)
    maps = IMAGES * CANDIDATES
    with torch.no_grad():
        exact = plain(copy.deepcopy(scorer).double(), labels[:1], features[:1].double(), 1)
        error = ((scorer(labels, features, 1)[:1] - exact).abs().max() / exact.std()).item()
        assert error < 0.2, f"error {error} of the scores' spread"
        steps = {"ours": lambda: scorer(labels, features, 1), "eager": lambda: plain(scorer, labels, features, 1)}
        for name, function in compile_peer(plain).items():
            steps[name] = lambda function=function: function(scorer, labels, features, 1)
        times = {name: graph_seconds(step, DEVICE) for name, step in steps.items()}
        print_times(f"forward, {maps} maps, bfloat16 (error {error:.3f} of the spread)", times, operations(maps))
        wall = call_seconds(steps["ours"], DEVICE)
        print(f"{'bar':>10} {BAR * 1e3:9.3f}    plain calls, launches included: {wall[len(wall) // 2] * 1e3:.3f} ms")
        benchmark.extra_info.update(times=times, bar=BAR, operations=operations(maps), error=error)

        def waited():
            steps["ours"]()
            synchronize(DEVICE)

        benchmark.pedantic(waited, rounds=1 if TINY else 20, warmup_rounds=1)


def test_training_step(benchmark):
    scorer, labels, features = case(PAIRS, 2 * CONFIG.num_scales, torch.float32)
    scorer.train().requires_grad_(True)
    scales = torch.arange(CONFIG.num_scales, device=DEVICE).repeat(2)

    def loss(score):
        with torch.autocast(DEVICE.type, HALF):
            real, generated = score().chunk(2, dim=1)
        scorer.zero_grad(set_to_none=True)
        F.softplus(generated - real).mean().backward()

    steps = {
        "ours": lambda: loss(lambda: scorer(labels, features, scales)),
        "eager": lambda: loss(lambda: plain(scorer, labels, features, 0)),
    }
    for name, function in compile_peer(plain).items():
        steps[name] = lambda function=function: loss(lambda: function(scorer, labels, features, 0))
    all_times = {name: call_seconds(step, DEVICE) for name, step in steps.items()}
    times = {name: seconds[len(seconds) // 2] for name, seconds in all_times.items()}
    maps = features.shape[0] * features.shape[1]
    # Backward does two more convolutions for each one, for its two gradients.
    print_times(f"training step, {maps} maps, bfloat16 autocast", times, 3 * operations(maps))
    print(f"{maps / times['ours']:.0f} maps per second")
    benchmark.extra_info.update(times=times)
    benchmark.pedantic(steps["ours"], rounds=1 if TINY else 10, warmup_rounds=1)


def stages():
    """(width, side) per stage."""
    return zip(CONFIG.widths, stage_sides(CONFIG.size), strict=True)


def norm_steps(x, weight, bias, residual, grad):
    """{row: (step, passes over memory)} for the norm with activation, with and without the residual."""
    asked = [tensor.detach().requires_grad_() for tensor in (x, weight, bias, residual)]

    def ours(x, weight, bias, residual):
        return map_norm(x, weight, bias, residual=residual, negative_slope=0.2)

    def peer(x, weight, bias, residual):
        return eager_norm(x, weight, bias, residual, 0.2)

    def forward(function):
        return lambda: function(x, weight, bias, residual)

    def both(function):
        return lambda: torch.autograd.grad(function(*asked), asked, grad)

    return {
        "forward": (lambda: map_norm(x, weight, bias, negative_slope=0.2), 2),
        "forward, residual": (forward(ours), 3),
        "  eager forward": (forward(peer), 3),
        **{f"  {name} forward": (forward(function), 3) for name, function in compile_peer(peer).items()},
        "backward": (lambda: map_norm_backward(grad, x, weight, bias, None, 0.2, 1e-5), 3),
        "backward, residual": (lambda: map_norm_backward(grad, x, weight, bias, residual, 0.2, 1e-5), 5),
        "both, residual": (both(ours), 8),
        "  eager both": (both(peer), 8),
    }


def test_norm(benchmark):
    """The norm on the features of every stage: bandwidth, and time over the floor."""
    bandwidth, maps, rows = peak()[0], IMAGES * CANDIDATES, []
    print(f"\nnorm, {maps} maps, bfloat16, {device_name(DEVICE)}")
    print(f"{'features':>14} {'':<18} {'MB':>7} {'us':>8} {'GB/s':>6} x floor")
    for width, side in stages():
        torch.manual_seed(0)
        x, residual, grad = (
            torch.randn(maps, width, side, side, device=DEVICE).to(HALF, memory_format=torch.channels_last)
            for _ in range(3)
        )
        weight, bias = torch.rand(2, width, side, side, device=DEVICE).to(HALF)
        error = map_norm(x[:4], weight, bias, residual=residual[:4], negative_slope=0.2).double()
        error -= exact_norm(x[:4], weight, bias, residual[:4], slope=0.2)
        assert error.abs().max() < 2**-6
        for name, (step, passes) in norm_steps(x, weight, bias, residual, grad).items():
            seconds = graph_seconds(step, DEVICE)
            moved = passes * x.numel() * x.element_size()
            rows.append({"width": width, "side": side, "step": name, "seconds": seconds, "bytes": moved})
            print(
                f"{f'{width}x{side}x{side}':>14} {name:<18} {moved / 1e6:7.1f} {seconds * 1e6:8.1f} "
                f"{moved / seconds / 1e9:6.0f} {seconds * bandwidth / moved:7.2f}"
            )
    benchmark.extra_info["rows"] = rows
    step = norm_steps(x, weight, bias, residual, grad)["forward, residual"][0]
    benchmark.pedantic(step, rounds=1 if TINY else 20, warmup_rounds=1)


@pytest.mark.parametrize("maps", [IMAGES * CANDIDATES])
def test_where_forward_spends_its_time(maps):
    """The time and the floor of every layer, except the MLP, without launches."""
    bandwidth, rate = peak()
    scorer, _, features = case(IMAGES, CANDIDATES)
    x, total, floors = features.flatten(0, 1), 0.0, 0.0
    print(f"\n{'layer':>20} {'output':>14} {'Gop':>6} {'MB':>6} {'us':>8} {'floor':>7}")

    def show(name, out, seconds, count, moved):
        nonlocal total, floors
        floor = max(count / rate, moved / bandwidth)
        total, floors = total + seconds, floors + floor
        size = "x".join(map(str, out.shape[1:]))
        print(f"{name:>20} {size:>14} {count / 1e9:6.1f} {moved / 1e6:6.1f} {seconds * 1e6:8.1f} {floor * 1e6:7.1f}")

    def timed(name, convolution, norm, x, residual=None, slope=0.2):
        def convolve():
            return F.conv2d(x, convolution.weight, None, convolution.stride, convolution.padding)

        y = convolve()
        count = 2 * y.numel() * convolution.weight[0].numel()
        show(name, y, graph_seconds(convolve, DEVICE), count, 2 * (x.numel() + y.numel()))

        def normalise():
            return norm(y, residual, slope)

        passes = 2 if residual is None else 3
        show("norm", y, graph_seconds(normalise, DEVICE), 0, passes * 2 * y.numel())
        return normalise()

    with torch.no_grad():
        for block in (block for stage in scorer.stages for block in stage[:2]):
            y = timed("3x3", block.conv1, block.ln1, x)
            y = timed("3x3", block.conv2, block.ln2, y)
            shortcut = timed("1x1, shortcut", *block.shortcut, x, slope=None) if len(block.shortcut) else x
            x = timed("1x1", block.conv3, block.ln3, y, shortcut)
    print(f"{'all':>20} {'':>14} {'':>6} {'':>6} {total * 1e6:8.1f} {floors * 1e6:7.1f}")
