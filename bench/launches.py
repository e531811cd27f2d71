"""Recording all launches of generations of the published sizes.

Whole generations run through varkern's loop, with the published vocabularies, code widths and schedules. The
transformer is very small, because the launches do not depend on it: d16, d20, d24 and d30 of VAR are one case. The
kernels are recorded and do not run; their results are zeros.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import varkern
from tests.standins.models import small_flexvar, small_infinity, texts
from varkern import ops
from varkern.models import PATCH_NUMS_256, VAR, VQVAE

BATCH = 24  # the batch size of the times in the LSRS paper
CANDIDATES = (1, 4, 128)
INFINITY_SIDES = (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64)  # one megapixel, square
FILTERS = {"top_k": 900, "top_p": 0.96}


class BlankScorer:
    """Takes features in the format of a scorer on a GPU, and gives every map the same score."""

    input_dtype, channels_last = torch.bfloat16, True

    def __call__(self, labels, features, scale) -> Tensor:
        return torch.zeros(features.shape[:2])


def best_of(m: int) -> varkern.BestOfM | None:
    return None if m == 1 else varkern.BestOfM(BlankScorer(), m=m, pick="resample")


def generate_var(batch: int, search, **filters) -> None:
    """VAR at 256 px: V=4096, C=32, ten scales."""
    vae = VQVAE(4096, 32, 32, ch_mult=(1, 1, 1, 1, 1), num_res_blocks=1, v_patch_nums=PATCH_NUMS_256)
    model = VAR(vae, depth=1, embed_dim=64, num_heads=1, patch_nums=PATCH_NUMS_256).eval().requires_grad_(False)
    labels = torch.arange(batch)
    varkern.generate(model, labels, search=search, seeds=0, decode=False, cfg=1.5, **(FILTERS | filters))


def generate_flexvar(batch: int, search) -> None:
    """FlexVAR d24 at 256 px: V=8912, C=32, ten scales."""
    model, vae = small_flexvar(8912)
    options = {"vqvae": vae, "infer_patch_nums": list(PATCH_NUMS_256), "cfg": 2.5, "top_k": 900, "top_p": 0.95}
    labels = torch.arange(batch) % model.num_classes
    varkern.generate(model, labels, search=search, seeds=0, decode=False, **options)


def generate_infinity(batch: int, search) -> None:
    """Infinity 2B at one megapixel: 32 bits per position, thirteen scales, as its published script calls it."""
    schedule = [(1, side, side) for side in INFINITY_SIDES]
    model, vae = small_infinity(schedule, bits=32)
    varkern.patch(model, search)
    options = {"cfg_list": [3.0] * 13, "tau_list": [0.5] * 13, "top_k": 900, "top_p": 0.97, "cfg_insertion_layer": [0]}
    options |= {"returns_vemb": 1, "vae_type": 32, "inference_mode": True, "ret_img": False, "g_seed": 0}
    text = texts([5] * batch)
    model.autoregressive_infer_cfg(vae=vae, scale_schedule=schedule, label_B_or_BLT=text, B=batch, **options)


def score(dtype: torch.dtype, train: bool) -> None:
    """The ImageNet scorer on a few maps; their number does not change how its norms are compiled."""
    scorer = varkern.Scorer().to(dtype).train(train)
    features = torch.zeros(2, 4, 32, 16, 16, dtype=dtype, requires_grad=train)
    scores = scorer(torch.tensor([1, 2]), features, 3)
    if train:
        scores.sum().backward()


def keep(batch: int, *shape: int, dtype: torch.dtype = torch.int64) -> None:
    """What a step of block resampling with 8 proposals launches besides those of a search among 8 whole maps."""
    kept, maps = torch.zeros(batch, *shape, dtype=dtype), torch.zeros(batch, 8, *shape, dtype=dtype)
    noise = torch.zeros(batch, 9, 17)[:, :, 1]
    ops.keep_maps(kept, torch.zeros(batch), maps, torch.zeros(batch, 8), noise=noise)


def scenarios() -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield the name of every scenario and the function that runs it."""
    density = varkern.DensitySearch(n=50, min_distance=0)
    for m in CANDIDATES:
        yield f"VAR M={m}", lambda m=m: generate_var(BATCH, best_of(m))
    yield "VAR M=4, top-p only", lambda: generate_var(BATCH, best_of(4), top_k=0)
    yield "VAR, one image, M=4", lambda: generate_var(1, best_of(4))
    yield "VAR, density n=50", lambda: generate_var(BATCH, density)
    for side in (2, 5, 16):
        yield f"VAR, blocks, side {side}", lambda side=side: keep(BATCH, side * side)
    yield "Infinity, blocks", lambda: keep(1, 4096, 32, dtype=torch.uint8)
    for m in CANDIDATES:
        yield f"FlexVAR M={m}", lambda m=m: generate_flexvar(BATCH, best_of(m))
    for m in (1, 4):
        yield f"Infinity M={m}", lambda m=m: generate_infinity(1, best_of(m))
    infinity_density = varkern.DensitySearch(n=500, representatives=100, scales=(3,), strategy="rank", min_distance=0)
    yield "Infinity, density n=500", lambda: generate_infinity(1, infinity_density)
    yield "scorer, bfloat16", lambda: score(torch.bfloat16, train=False)
    yield "scorer, training", lambda: score(torch.float32, train=True)
    yield "density, large", lambda: ops.kernel_density(torch.zeros(1, 3000, 32))
    yield "density, cosine", lambda: ops.kernel_density(torch.zeros(1, 100, 32), metric="cosine")


@contextlib.contextmanager
def zero_memory() -> Iterator[None]:
    """Make ``torch.empty`` return zeros: a recorded kernel writes nothing, and zeros are valid token ids."""
    makers = {(torch, "empty"): torch.empty, (torch, "empty_like"): torch.empty_like}
    makers[torch.Tensor, "new_empty"] = torch.Tensor.new_empty
    for (owner, name), make in makers.items():
        setattr(owner, name, lambda *args, make=make, **kwargs: make(*args, **kwargs).zero_())
    try:
        yield
    finally:
        for (owner, name), make in makers.items():
            setattr(owner, name, make)
