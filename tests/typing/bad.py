"""A user's mistakes: mypy and pyright must report the lines marked "error", and no other. It is never run."""

import torch

import varkern
from varkern.search import Choice

var = varkern.load_var("demo")
scorer = varkern.Scorer()
labels = torch.arange(8)
codes, maps, f_hat = torch.randn(50, 16), torch.zeros(2, 4, 9, dtype=torch.int64), torch.zeros(2, 16, 6, 6)


class NoChoice:
    """Lacks the method ``choose``."""

    def num_candidates(self, scale: int, num_scales: int) -> int:
        return 4


class NumberedChoice:
    """Its method returns another thing than is asked for."""

    def num_candidates(self, scale: int, num_scales: int) -> int:
        return 4

    def choose(self, candidates: varkern.search.Candidates) -> int:
        return candidates.scale


def two_arguments(labels: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    return features.mean((2, 3, 4))


varkern.patch(var, sampler="philoxx")  # error
varkern.patch(var, loop="fast")  # error
varkern.patch(var, NoChoice())  # error
varkern.patch(var, [varkern.BestOfM(scorer), NumberedChoice()])  # error
varkern.patch(var, graph=True)  # error
varkern.patched(var, sampler="greedy")  # error
varkern.searching(var, sampler="gumbel")  # error
varkern.check(var, sampler="philoxx")  # error
varkern.generate(var, labels, loop="own")  # error
varkern.generate(var, labels, sampler="philoxx")  # error
varkern.generate(var, "cat")  # error
varkern.generate(var, labels, decode=False).images.cpu()  # error
varkern.BestOfM(scorer, pick="bst")  # error
varkern.BestOfM(scorer, m="4")  # error
varkern.BlockResample(scorer, pick="bst")  # error
varkern.BlockResample(scorer, blocks="half")  # error
varkern.BestOfM(two_arguments)  # error
varkern.PathSearch("8")  # error
varkern.PathSearch(8, {2: "best"})  # error
varkern.PathSearch(8, reward=two_arguments)  # error
varkern.PathSearch(8, search="best")  # error
varkern.PathSearch.best_of_n(8)  # error
varkern.search.Resample(1.0, "product")  # error
varkern.search.Top("product")  # error
varkern.DensitySearch(strategy="hybird")  # error
varkern.DensitySearch(metric="cosin")  # error
varkern.DensitySearch(per="token")  # error
varkern.DensitySearch(bandwidth="scott")  # error
varkern.DensitySearch(threshold="published")  # error
varkern.DensitySearch(compat="repository")  # error
varkern.DensitySearch.recommended_alpha(30, "Infinity")  # error
varkern.use_backend("cuda")  # error
varkern.ops.fuse_tokens(maps, codes, side=3, size=6, interpolation="cubic")  # error
varkern.ops.commit_tokens(maps[:, 0], f_hat, codes, side=3, interpolation="linear")  # error
varkern.ops.resize_features(f_hat, size=4, interpolation="lanczos")  # error
varkern.ops.kernel_density(codes, metric="manhattan")  # error
varkern.ops.silverman_bandwidth(codes, metric="manhattan")  # error
varkern.ops.token_density(maps, codes, per="token")  # error
varkern.ops.bit_density(maps.byte(), 0.3, bandwidth="scott")  # error
varkern.Scorer(10)  # error
varkern.BestOfM(scorer, temperature="fit")  # error
varkern.SumOfScorers([scorer, scorer])  # error
var.autoregressive_infer_cfg(B=8, label_B=labels, g_seed="0")  # error
varkern.patch(var).autoregressive_inference(B=8)  # error
varkern.BestOfN(scorer)  # error
varkern.patch(var, varkern.BestOfM(scorer, m=4), sampler="multinomial")
print(Choice(labels, labels).index.tolist(), varkern.explain_patch(var).loop == "fused")
