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

import torch
import torch.nn.functional as F

from bench.measure import BATCH, DEVICE, RATES, TINY, Table, bar, call_seconds, graph_seconds, synchronize
from bench.roofline import Part, counting
from tests.references.norm import eager_norm, exact_norm
from tests.references.scorer import eager_scores
from varkern import Scorer, ScorerConfig
from varkern.ops import map_norm
from varkern.scorer import stage_sides

CONFIG = ScorerConfig(5, 3, 4, 4, widths=(8,), embedding=4, hidden=(4,)) if TINY else ScorerConfig()
IMAGES, CANDIDATES = BATCH, 2 if TINY else 128
PAIRS = 1 if TINY else 128
BAR = 2e-3
HALF = torch.bfloat16


map_norm_backward = torch.ops.varkern.map_norm_backward


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
    """A row per way of computing ``count`` operations; ``times``: seconds by name."""
    table = Table()
    for name, seconds in times.items():
        row = {title: name, "ms": seconds * 1e3, "TFLOP/s": count / seconds / 1e12}
        table.add(row | {"of peak": count / seconds / RATES.half, "x ours": seconds / times["ours"]})


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
        times = {name: graph_seconds(step) for name, step in steps.items()}
        print_times(f"forward, {maps} maps, bfloat16", times, operations(maps))
        bar("forward, ms", times["ours"] * 1e3, BAR * 1e3)
        print(f"plain calls: {call_seconds(steps['ours']) * 1e3:.3f} ms; error {error:.3f} of the scores' spread")
        benchmark.extra_info.update(times=times, bar=BAR, operations=operations(maps), error=error)

        def waited():
            steps["ours"]()
            synchronize()

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
    times = {name: call_seconds(step) for name, step in steps.items()}
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
    maps, rows, table = IMAGES * CANDIDATES, [], Table()
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
            moved = passes * x.numel() * x.element_size()
            rows.append(timed(name, x, graph_seconds(step), 0, moved))
            table.add(rows[-1])
    benchmark.extra_info["rows"] = rows
    step = norm_steps(x, weight, bias, residual, grad)["forward, residual"][0]
    benchmark.pedantic(step, rounds=1 if TINY else 20, warmup_rounds=1)


def timed(name, out, seconds, count, moved):
    """A row for one step with the result ``out``, ``count`` operations and ``moved`` bytes."""
    row = {"step": f"{name:<18}", "result": f"{'x'.join(map(str, out.shape[1:])):>14}", "Gop": count / 1e9}
    row |= {"MB": moved / 1e6, "us": seconds * 1e6, "GB/s": moved / seconds / 1e9}
    return row | {"floor us": max(count / RATES.half, moved / RATES.bandwidth) * 1e6}


def test_where_forward_spends_its_time():
    """The time and the floor of every layer, except the MLP, without launches."""
    scorer, _, features = case(IMAGES, CANDIDATES)
    x, table, rows = features.flatten(0, 1), Table(), []

    def show(*arguments):
        rows.append(timed(*arguments))
        table.add(rows[-1])

    def layer(name, convolution, norm, x, residual=None, slope=0.2):
        def convolve():
            return F.conv2d(x, convolution.weight, None, convolution.stride, convolution.padding)

        y = convolve()
        count = 2 * y.numel() * convolution.weight[0].numel()
        show(name, y, graph_seconds(convolve), count, 2 * (x.numel() + y.numel()))
        show(
            "norm", y, graph_seconds(lambda: norm(y, residual, slope)), 0, (2 + (residual is not None)) * 2 * y.numel()
        )
        return norm(y, residual, slope)

    with torch.no_grad():
        for block in (block for stage in scorer.stages for block in stage[:2]):
            y = layer("3x3", block.conv1, block.ln1, x)
            y = layer("3x3", block.conv2, block.ln2, y)
            shortcut = layer("1x1, shortcut", *block.shortcut, x, slope=None) if len(block.shortcut) else x
            x = layer("1x1", block.conv3, block.ln3, y, shortcut)
    Table().add({"all": "", **{name: sum(row[name] for row in rows) for name in ("us", "floor us")}})
