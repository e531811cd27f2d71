"""The counts behind the floors equal PyTorch's own flop counter, and a floor is the larger of its two bounds."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench.measure import DEVICES, Rates
from bench.roofline import Part, count_model, counting, published_models, table
from varkern.models import VAR, VQVAE
from varkern.scorer import Scorer, ScorerConfig

SIDES = (1, 2, 4)


def small_models() -> tuple[VAR, Scorer]:
    vae = VQVAE(64, 8, 16, ch_mult=(1, 2), norm_groups=4, v_patch_nums=SIDES)
    var = VAR(vae, num_classes=7, depth=3, embed_dim=24, num_heads=3, patch_nums=SIDES)
    return var, Scorer(ScorerConfig(7, 3, 8, 4, widths=(8,), embedding=4, hidden=(8,)))


def counted_by_torch(call) -> int:
    # PyTorch's counter does not know the CPU's fused attention; the plain form is two matrix products, which it does.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_blocks_and_head_as_pytorch_counts_them():
    (var, scorer), batch = small_models(), 2

    def scales():
        cond = torch.randn(2 * batch, var.C)
        for block in var.blocks:
            block.attn.kv_caching(True)
        for side in SIDES:
            x = torch.randn(2 * batch, side * side, var.C)
            for block in var.blocks:
                block(x=x, cond_BD=cond, attn_bias=None)
            var.head(var.head_nm(x, cond))
        for block in var.blocks:
            block.attn.kv_caching(False)

    wanted = counted_by_torch(scales)
    var.vae_proxy[0].to("meta")
    parts = count_model(var.to("meta"), scorer.to("meta"), batch, 1)
    assert parts["blocks"].operations + parts["head"].operations == wanted > 0


def test_decoder_and_scorer_as_pytorch_counts_them():
    var, scorer = small_models()
    vae = var.vae_proxy[0]
    f_hat = torch.randn(3, 8, 4, 4)
    part = Part()
    with counting(part):
        vae.fhat_to_img(f_hat)
    assert part.operations == counted_by_torch(lambda: vae.fhat_to_img(f_hat)) > 0
    labels, features, part = torch.zeros(2, dtype=torch.int64), torch.randn(2, 5, 8, 4, 4), Part()
    with counting(part):
        scorer(labels, features, 1)
    assert part.operations == counted_by_torch(lambda: scorer(labels, features, 1)) > 0


def test_a_floor_is_the_larger_bound_of_every_step():
    rates = Rates(bandwidth=10.0, half=100.0)
    assert Part([(1000.0, 1.0), (1.0, 50.0)]).floor(rates) == pytest.approx(10.0 + 5.0)


def test_candidates_cost_only_what_searching_costs():
    var, scorer = published_models(16)
    one, four = (count_model(var, scorer, 24, m) for m in (1, 4))
    assert one["scorer"].operations == 0 and four["scorer"].operations > 0
    for name in ("blocks", "head", "decoder", "winner"):
        assert one[name].steps == four[name].steps
    # 24 images, four candidates, nine searched scales, 16x16 maps of 32 channels through the scorer's first layer
    first = 24 * 4 * 9 * 2 * 9 * 32 * 32 * 256
    assert four["scorer"].operations > first
    assert len(four["F"].steps) == 9 and len(count_model(var, scorer, 24, 4, first_scale=3)["F"].steps) == 7
    assert one["sampler"].bytes == pytest.approx(48 * 680 * 4096 * 4, rel=1e-3)


def test_the_table_has_a_row_per_part():
    text = table(16, 1, [1, 4], DEVICES["H200"])
    assert text.count("\n| ") == 9 and "| part | M=1 Gop | MB | floor ms | M=4 Gop |" in text
