"""A user's code that mypy and pyright must accept. It is checked and never run, see check_types.py."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import varkern
from varkern.models import VAR, VQVAE
from varkern.search import Candidates, Choice, Paths, Search

var: VAR = varkern.load_var("demo")
vae: VQVAE = varkern.load_vae("vae.pth", v_patch_nums=(1, 2, 3))
scorer: varkern.Scorer = varkern.Scorer.from_pretrained(Path("scorer.safetensors"), dtype=torch.bfloat16)
labels = torch.arange(8)
seeds: Tensor = varkern.image_seeds(0, 8)


def quickstart() -> None:
    """README: patch, generate, unpatch."""
    varkern.patch(var, varkern.BestOfM(scorer, m=4))
    images: Tensor = var.autoregressive_infer_cfg(B=8, label_B=labels, cfg=1.5, top_k=900, top_p=0.96, g_seed=0)
    images.cpu()
    var.autoregressive_infer_cfg(8, 3, seeds, torch.ones(8, 1, 1)).cpu()
    same: VAR = varkern.unpatch(var)
    same.eval()


def results() -> None:
    """What generate returns has images unless it is asked for tokens only."""
    search = varkern.BestOfM(scorer, m=4, pick=2, temperature=0.5)
    result = varkern.generate(var, labels, search=search, seeds=seeds, top_k=900, top_p=0.96)
    result.images.cpu()
    result.scores[2].argmax(-1).tolist()
    result.choices[2].tolist()
    tokens: list[Tensor] = result.tokens
    seconds: float = sum(result.seconds)
    result.effective_sample_size(0.5)[2].mean()
    result.steps[2].acceptance().tolist()
    result.paths.survivors[2].tolist()
    result.paths.ancestors()[0].tolist()
    images, _, scores, *_ = varkern.generate(var, [1, 2, 3], decode=True, loop="fused")
    images.cpu()
    nothing = varkern.generate(var, np.arange(3), decode=False, sampler="multinomial")
    assert nothing.images is None and scores and tokens and seconds
    perhaps = varkern.generate(var, None, batch_size=8, decode=len(scores) > 1)
    if perhaps.images is not None:
        perhaps.images.cpu()


def show(result: varkern.Generation) -> Tensor:
    """The plain name of the class means a result with images."""
    return result.images.cpu()


def searches() -> list[Search]:
    """Every search of varkern and the settings that it takes."""
    shown = [show(varkern.generate(var, 3, search=[varkern.DensitySearch(n=50), varkern.BestOfM(scorer, m=4)]))]
    alpha: float = varkern.DensitySearch.recommended_alpha(30, "VAR").middle
    return [
        varkern.BestOfM(scorer, m=(1, 2, 4, 8, 8), pick="resample", maps_at_once=len(shown)),
        varkern.BestOfM(scorer, pick="resample", temperature="fitted"),
        varkern.BestOfM(smoothness, first_scale=1, last_scale=3, pick="best"),
        varkern.BestOfM(varkern.PublishedScorer(network)),
        varkern.BestOfM(varkern.SumOfScorers(scorer, smoothness, varkern.SumOfScorers(scorer, scorer))),
        varkern.DensitySearch(50, 10, alpha, (1, 2), "rank", "cosine", "map", "batch", 0.0, threshold="paper"),
        varkern.DensitySearch(scales=1, strategy="small", per="position", bandwidth=0.3, compat="released"),
        varkern.BlockResample(scorer, 4, 4, blocks={3: 1, 4: 2}, pick="best"),
        varkern.BlockResample(smoothness, blocks=lambda scale, side: max(side // 4, 1), sweeps=2),
        varkern.PathSearch((8, 8, 4, 2, 1), {2: "cluster", 3: newest, 4: "top"}, brightness, features=brightness),
        varkern.PathSearch(8, {4: varkern.search.Resample(1.0, "difference")}, varkern.LogRatio(scorer)),
        varkern.PathSearch.best_of_n(4, lambda condition, images, scale: [0.0] * len(images), MostUsual()),
        varkern.PathSearch(4, None, brightness, search=[varkern.BestOfM(scorer)], images_at_once=8),
        varkern.Combined(varkern.DensitySearch(bandwidth=torch.ones(8)), MostUsual(), Untyped(), Composed()),
    ]


def smoothness(labels, features, scale):
    """A scorer of docs/extend.md, without types."""
    return -100 * features.diff(dim=-2).square().mean((-3, -2, -1))


def brightness(condition, images, scale):
    """A reward of docs/paths.md, without types."""
    return images.mean((1, 2, 3))


def newest(paths: Paths) -> Tensor:
    """A rule with types."""
    return paths.rewards().argsort(1)[:, : paths.num_kept]


def network(features: Tensor, labels: Tensor, scales: Tensor) -> Tensor:
    """A network with the published arguments."""
    return features.mean((1, 2, 3)).unsqueeze(1)


class OwnScorer(nn.Module):
    """A scorer that is a module."""

    def forward(self, labels: Tensor, features: Tensor, scale: int) -> Tensor:
        return features.mean((2, 3, 4))


class MostUsual:
    """The search of docs/extend.md, with types."""

    def num_candidates(self, scale: int, num_scales: int) -> int:
        return 8 if scale > 0 else 1

    def choose(self, candidates: Candidates) -> Choice:
        tokens = candidates.tokens  # [B, M, l]
        features = candidates.fuse(0, 8, dtype=torch.bfloat16)  # [B, M, C, H, W]
        shared = (tokens.unsqueeze(1) == tokens.unsqueeze(2)).sum((2, 3)).float() + 0 * features.sum()
        return Choice(shared.argmax(-1), shared + 0 * candidates.uniforms(1))


class Composed(MostUsual):
    """A search that composes the map that it keeps, of a model with a codebook."""

    def choose(self, candidates: Candidates) -> Choice:
        height, width = candidates.grid
        swap = candidates.step_uniforms(height * width, 1)[:, :, 0] < 0.5
        maps = torch.where(swap, candidates.tokens[:, 0], candidates.tokens[:, 1])[:, None]
        scores = candidates.fuse_maps(maps).mean((2, 3, 4)) + candidates.codebook[maps].mean()
        return Choice(torch.zeros(len(maps), dtype=torch.int64), scores + candidates.by_position().sum(), maps[:, 0])


class Untyped:
    """The search of docs/extend.md as it stands there."""

    def num_candidates(self, scale, num_scales):
        return 8 if scale > 0 else 1

    def choose(self, candidates):
        tokens = candidates.tokens
        shared = (tokens.unsqueeze(1) == tokens.unsqueeze(2)).sum((2, 3)).float()
        return Choice(shared.argmax(-1), shared)


def loops() -> None:
    """Every way to search in a loop, and the choice of a backend."""
    varkern.patch(var, MostUsual(), sampler="philox", cuda_graph=True, loop="auto", method=None)
    with varkern.patched(var, [varkern.BestOfM(OwnScorer())], sampler="multinomial", loop="own") as model:
        model.autoregressive_infer_cfg(8, labels).cpu()
    with varkern.searching(var, Untyped(), seeds=0, sampler="philox"):
        var.autoregressive_infer_cfg(8, labels)
    way = varkern.explain_patch(var)
    varkern.patch(var, loop=way.loop)
    varkern.check(var, varkern.BestOfM(scorer), top_k=20, sampler="multinomial", loop="fused")
    varkern.use_backend("torch")
    with varkern.use_backend("triton"), varkern.use_backend("auto"):
        pass
    try:
        varkern.patch(var)
    except (varkern.UnsupportedModelError, varkern.OwnLoopError) as error:
        print(error)


def operations() -> None:
    """Every public op returns a tensor."""
    codebook, maps, bits = torch.randn(50, 16), torch.zeros(2, 4, 9, dtype=torch.int64), torch.zeros(1, 5, 4, 8).byte()
    logits, f_hat = torch.randn(2, 9, 50), torch.zeros(2, 16, 6, 6)
    print(varkern.ops.sample_tokens(logits, 4, guidance=1.5, uncond_logits=logits, seeds=seeds).shape)
    print(varkern.ops.sample_tokens(logits, seeds=seeds, top_k=3, top_p=0.9, temperature=2.0).shape)
    phi = (torch.randn(16, 16, 3, 3), None, 0.5)
    print(varkern.ops.fuse_tokens(maps, codebook, side=3, size=(6, 6), phi=phi, interpolation="trilinear").shape)
    varkern.ops.commit_tokens(maps[:, 0], f_hat, codebook, side=(3, 3), interpolation="area")
    print(varkern.ops.resize_features(f_hat, size=4, interpolation="bilinear").shape)
    kept = varkern.ops.keep_maps(maps[:, 0], logits[:, 0, 0], maps, logits[:, 1, :4], temperature=0.5)
    print(kept.maps.shape, kept.scores.shape, kept.index.shape)
    print(varkern.ops.map_norm(f_hat, f_hat[0], f_hat[0], residual=f_hat, negative_slope=0.2).shape)
    print(varkern.ops.kernel_density(logits, bandwidth=1.0, metric="cosine").shape)
    print(varkern.ops.silverman_bandwidth(logits, "euclidean").shape)
    print(varkern.ops.token_density(maps, codebook, "map", bandwidth="batch", metric="cosine").shape)
    print(varkern.ops.bit_density(bits, 0.35, per="position", bandwidth=torch.ones(1)).shape)


def scorers() -> None:
    """Scorers, made and saved."""
    config = varkern.ScorerConfig(num_classes=10, num_scales=5, channels=16, size=6, widths=(32, 64))
    own = varkern.Scorer(config)
    own.save_pretrained("folder/scorer.safetensors", {"note": "mine"})
    print(own(labels, torch.randn(8, 4, 16, 6, 6), 2).shape, own.config.size + 1, varkern.__version__.split("."))


def hub() -> None:
    """A scorer on the hub."""
    scorer.save_pretrained("folder", {"note": "text"})
    address: str = scorer.push_to_hub("user/repo", private=True)
    found: varkern.Scorer = varkern.Scorer.from_pretrained("user/repo", revision="v1", token="t", local_files_only=True)
    print(address, found.metadata.get("training", ""))
    found.metadata = {}
