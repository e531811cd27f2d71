"""The three families, each as something that can be built, called and looked into in one way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.helpers import TINY_SIDES, small_var
from varkern import image_seeds

from .models import FLEX_SIDES, NUM_BITS, SCHEDULE, small_flexvar, small_infinity, texts

LABELS = torch.tensor([3, 0, 5, 1, 2])
LENGTHS = (3, 5, 2, 6, 4)
SEEDS = torch.tensor([11, -4, 2**62, 7, 0])


class Case:
    """One family, or one kind of it.

    Attributes:
        published: named options over which bit parity is held.
        shapes: of the tokens of one image, a scale.
        size: ``[C, H, W]`` of the fused features.
        labels: what a scorer is given of all five images.
    """

    labels: Any = LABELS

    def build(self) -> Any: ...

    def arguments(self, places) -> dict[str, Any]: ...

    def call(self, model, seed, places=(0, 1, 2, 3, 4), **options) -> Any:
        """What the model's method returns for images at some of five places."""
        return model.autoregressive_infer_cfg(**{**self.arguments(list(places)), "g_seed": seed, **options})

    def images(self, published) -> Tensor:
        return published

    def attentions(self, model) -> list:
        return [block.attn for block in model.blocks]

    def decoded(self, model, features: Tensor) -> Tensor:
        """The image of fused features ``[B, C, H, W]`` of the last scale."""
        ...


class VARCase(Case):
    def __init__(self):
        self.size, self.shapes = (8, 6, 6), [(side * side,) for side in TINY_SIDES]
        smooth = {"cfg": 4.0, "top_k": 20, "top_p": 0.9, "more_smooth": True}
        one = torch.full((1, 1, 1), 2.5)
        self.published = {"plain": {}, "filtered, smooth": smooth, "one strength in a tensor": {"cfg": one}}

    def build(self):
        return small_var()

    def arguments(self, places):
        return {"B": len(places), "label_B": LABELS[places]}

    def decoded(self, model, features):
        return model.vae_proxy[0].fhat_to_img(features).add(1).mul(0.5)


class FlexVARCase(Case):
    def __init__(self):
        self.size, self.shapes = (32, 6, 6), [(side * side,) for side in FLEX_SIDES]
        self.published = {
            "plain": {},
            "no guidance": {"cfg": 0},
            "filtered": {"cfg": 2.5, "top_k": 20, "top_p": 0.9},
            "balanced": {"cfg": 4.0, "used_llamagen_cfg": True, "top_p": 0.9},
            "one strength in a tensor": {"cfg": torch.full((1, 1, 1), 2.5)},
            "one balanced strength in a tensor": {"cfg": torch.full((1, 1, 1), 4.0), "used_llamagen_cfg": True},
            "by image": {"cfg": torch.tensor([0.5, 3.0, 1.0, 0.0, 2.0]).view(5, 1, 1)},
            "greedy beyond 3": {"max_pn": 3, "top_p": 0.9},
            "a ramp of twelve scales": {"infer_patch_nums": (1, 2) * 6, "cfg": 3.0},
            "greedy at a side of 7": {"infer_patch_nums": [1, 2, 7, 4], "cfg": 3.0},
            "forbidden ids": {"invalid_ids": torch.arange(0, 64, 2)},
            "drawn labels": {"label_B": None},
        }

    def build(self):
        model, self.vae = small_flexvar()
        return model

    def arguments(self, places):
        return {"vqvae": self.vae, "B": len(places), "label_B": LABELS[places], "infer_patch_nums": FLEX_SIDES}

    def decoded(self, model, features):
        return self.vae.decoder(self.vae.post_quant_conv(features))


INFINITY_OPTIONS = {
    "plain": {},
    "defaults of filters": {"top_k": 0, "top_p": 0.0},
    "no guidance": {"cfg_list": [1] * 5},
    "by scale": {"cfg_list": [1, 3, 0.1, 1, 4], "tau_list": (0.5, 1.0, 0.3, 0.7, 2.0), "top_p": 0.6},
    "in a layer": {"cfg_insertion_layer": [-2]},
    "in layers and on logits": {"cfg_insertion_layer": [-3, 0, -1]},
    "on probabilities": {"cfg_insertion_layer": [1]},
    "negative texts": {"negative_label_B_or_BLT": texts((2, 7, 3, 3, 5), seed=50)},
    "no images": {"ret_img": False},
    "greedy": {"top_k": 1},
    "tensors in lists": {
        "cfg_list": [
            torch.tensor(2.5),
            torch.tensor(3.3, dtype=torch.float64),
            1,
            torch.tensor(0.7),
            torch.tensor(1.0),
        ],
        "tau_list": [torch.tensor(0.7), torch.full((1, 1, 1), 0.9), 0.3, torch.tensor([0.6]), 1.1],
    },
    "lists that are tensors": {"cfg_list": torch.tensor([2.3] * 5), "tau_list": torch.tensor([0.7] * 5)},
    "temperatures by image": {
        "cfg_list": [1] * 5,
        "tau_list": [torch.tensor([0.5, 0.9, 1.1, 2.0, 0.3]).view(5, 1, 1)] * 5,
    },
    "lists longer than the schedule": {"cfg_list": [2.5] * 9, "tau_list": [0.9] * 9},
}


class InfinityCase(Case):
    labels = texts(LENGTHS)

    def __init__(self, patch: int = 1, only: tuple[str, ...] = (), **config):
        self.config, self.patch = config, patch
        _, height, width = SCHEDULE[-1]
        self.size = (NUM_BITS, patch * height, patch * width)
        self.shapes = [(patch**2 * h * w, NUM_BITS) for _, h, w in SCHEDULE]
        generator = torch.Generator().manual_seed(6)
        maps = [torch.randint(2, (5, 1, patch * h, patch * w, NUM_BITS), generator=generator) for _, h, w in SCHEDULE]
        self.published = INFINITY_OPTIONS | {
            "three maps given": {"gt_leak": 3, "gt_ls_Bl": maps},
            "all maps given": {"gt_leak": 5, "gt_ls_Bl": maps},
            "cut off": {"trunk_scale": 3},
        }
        if only:
            self.published = {name: self.published[name] for name in only}

    def build(self):
        model, self.vae = small_infinity(**self.config)
        return model

    def arguments(self, places):
        return {
            "vae": self.vae,
            "scale_schedule": SCHEDULE,
            "label_B_or_BLT": texts([LENGTHS[place] for place in places]),
            "B": len(places),
            "cfg_list": [3.0] * 5,
            "tau_list": [0.8] * 5,
            "top_k": 900,
            "top_p": 0.97,
            "returns_vemb": 1,
            "cfg_insertion_layer": [0],
            "vae_type": NUM_BITS,
            "ret_img": True,
            "inference_mode": True,
        }

    def images(self, published):
        return published[2]

    def attentions(self, model):
        return [block.sa for block in model.unregistered_blocks]

    def decoded(self, model, features):
        image = (self.vae.decode(features) + 1) / 2
        return image.permute(0, 2, 3, 1).mul(255).to(torch.uint8).flip(dims=(3,))


# What a kind of Infinity with other shapes or other embeddings may do differently; the rest is the first kind's.
OF_A_KIND = ("plain", "no guidance", "in layers and on logits", "no images", "three maps given", "cut off")

CASES = {
    "VAR": VARCase(),
    "FlexVAR": FlexVARCase(),
    "Infinity": InfinityCase(),
    "Infinity, patchify": InfinityCase(2, (*OF_A_KIND, "all maps given"), apply_spatial_patchify=1),
    "Infinity, levels at every chunk": InfinityCase(only=OF_A_KIND, add_lvl_embeding_only_first_block=0),
}

# Without the kind that differs in the embeddings of levels alone: the parity of both loops covers it.
SHAPES = {name: case for name, case in CASES.items() if name != "Infinity, levels at every chunk"}


def placed(given: Any, device: torch.device) -> Any:
    """Arguments with every tensor and module on ``device``."""
    if isinstance(given, Tensor | torch.nn.Module):
        return given.to(device)
    if isinstance(given, dict):
        return {name: placed(value, device) for name, value in given.items()}
    return tuple(placed(value, device) for value in given) if isinstance(given, tuple) else given


def caches_closed(case: Case, model) -> bool:
    return all(a.cached_k is None and a.cached_v is None and not a.caching for a in case.attentions(model))


def seeds_at(places) -> Tensor:
    return SEEDS[list(places)]


def image_seeds_of(seed: int) -> Tensor:
    return image_seeds(seed, 5)


def same(first: Any, second: Any) -> bool:
    """Equality, bit for bit, of what published methods return: tensors, and lists and tuples of them."""
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, list | tuple):
        return type(first) is type(second) and len(first) == len(second) and all(map(same, first, second))
    return first == second
