"""Training of the demo's models from scratch: VQ-VAE, VAR, digit classifier and two scorers (``varkern demo train``).

The scorers are trained as for any other model: on two token-map datasets, by the code of ``varkern scorer train``. The
second is trained on top of the first, on maps that a search with the first resampled. Each stage writes its weights at
its end, and is skipped if they exist. A killed stage continues from its last checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from varkern.data import Batch, Manifest, TokenMaps, file_sha256, generate_token_maps, write_token_maps
from varkern.models import VAR, VQVAE, load_vae, load_var
from varkern.models.loading import save_model
from varkern.runs import write_tensors
from varkern.scorer import Scorer, ScorerConfig
from varkern.search import BestOfM, Search
from varkern.training import scorer as scorer_training
from varkern.training.features import FeatureMaker
from varkern.training.loop import fit
from varkern.training.recipe import ScorerTraining

from . import digits
from .classifier import DigitClassifier

PATCH_NUMS = (1, 2, 3, 4, 6)
STEPS_BETWEEN_RESTARTS = 50  # of codes of the VQ-VAE that no map uses
VAE_SIZES = {
    "vocab_size": 256,
    "z_channels": 16,
    "ch": 32,
    "ch_mult": (1, 1, 1),
    "num_res_blocks": 1,
    "norm_groups": 8,
    "v_patch_nums": PATCH_NUMS,
}
VAR_SIZES = {"num_classes": 10, "depth": 4, "embed_dim": 96, "num_heads": 4, "patch_nums": PATCH_NUMS}
SCORER_SIZES = ScorerConfig(
    num_classes=10, num_scales=5, channels=16, size=6, widths=(48, 64), embedding=32, hidden=(64, 32)
)
SAMPLING = {"cfg": 0.0, "top_p": 0.96}
BATCHES = {"batch_size": 500, "shard_size": 5000}
RESAMPLED_M = 16  # candidates of the search that draws the second scorer's maps


@dataclass(frozen=True)
class Recipe:
    """The length of each stage. The defaults make models like those that ship with the package."""

    seed: int = 0
    batch_size: int = 64
    vae_steps: int = 2500
    var_steps: int = 5000
    classifier_steps: int = 2000
    scorer_epochs: float = 6.4
    real_maps: int = 60_000
    generated_maps: int = 30_000
    sampling_seed: int = 1_000_000  # not a seed of any evaluation

    def scorer_training(self) -> ScorerTraining:
        """The settings of ``varkern scorer train``."""
        return ScorerTraining(
            epochs=self.scorer_epochs,
            warmup_epochs=0.1,
            batch_size=self.batch_size,
            learning_rate=2e-3,
            weight_decay=0.03,
            betas=(0.9, 0.95),
            max_norm=1.0,
            seed=self.seed + 7,
        )


def train_vae(recipe: Recipe, folder: Path, device: torch.device) -> None:
    """Train the VQ-VAE by reconstruction and quantizer loss. Residuals of the last batch replace unused codes."""
    vae = VQVAE(**VAE_SIZES, test_mode=False).to(device)
    quantizer = vae.quantize
    hits = torch.zeros(quantizer.vocab_size, device=device)
    latest: dict[str, Tensor] = {}

    def loss(step: int) -> Tensor:
        images = digits.real_batch(recipe.batch_size)[0].to(device)
        features = vae.encode(images)
        f_hat, ids, quantizer_loss = quantizer(features)
        for scale_ids in ids:
            hits.add_(torch.bincount(scale_ids.flatten(), minlength=len(hits)))
        latest["features"] = features.detach()
        return F.mse_loss(vae.decoder(vae.post_quant_conv(f_hat)), images) * 4 + quantizer_loss

    @torch.no_grad()
    def restart_dead_codes(step: int) -> None:
        if (step + 1) % STEPS_BETWEEN_RESTARTS or step > recipe.vae_steps * 0.7:
            return
        dead = (hits == 0).nonzero().flatten()
        if len(dead):
            features, residuals = latest["features"], []
            sums = [torch.zeros_like(features)] + [f_hat for _, f_hat in quantizer.quantize(features)]
            for side, f_hat in zip(PATCH_NUMS, sums, strict=False):
                pooled = F.interpolate(features - f_hat, size=(side, side), mode="area")
                residuals.append(pooled.permute(0, 2, 3, 1).flatten(0, 2))
            pool = torch.cat(residuals)
            quantizer.embedding.weight[dead] = pool[torch.randint(len(pool), (len(dead),), device=device)]
        hits.zero_()

    fit(
        "VQ-VAE",
        vae,
        loss,
        steps=recipe.vae_steps,
        learning_rate=1.5e-3,
        seed=recipe.seed + 1,
        checkpoint=folder / "vae.checkpoint.pt",
        weight_decay=0.0,
        after_step=restart_dead_codes,
        carried={"hits": hits},
        finish=lambda: save_model(vae, folder / "vae.safetensors"),
    )


def train_var(recipe: Recipe, folder: Path, device: torch.device) -> None:
    """Train the VAR by the cross-entropy of every token, with teacher forcing."""
    vae = load_vae(folder / "vae.safetensors", device=device)
    real = write_real_tokens(recipe, folder, device, folder / "tokens" / "real")
    maps = real.split(real.gather(range(len(real))).to(device))
    labels = torch.from_numpy(real.labels).to(device)
    torch.manual_seed(recipe.seed + 2)
    var = VAR(vae, **VAR_SIZES).to(device)

    def loss(step: int) -> Tensor:
        chosen = torch.randint(len(labels), (recipe.batch_size,)).to(device)
        batch = [scale_maps[chosen] for scale_maps in maps]
        with torch.no_grad():
            inputs = vae.quantize.idxBl_to_var_input(batch)
        logits = var(labels[chosen], inputs)
        return F.cross_entropy(logits.flatten(0, 1), torch.cat(batch, dim=1).flatten())

    fit(
        "VAR",
        var,
        loss,
        steps=recipe.var_steps,
        learning_rate=2e-3,
        seed=recipe.seed + 3,
        checkpoint=folder / "var.checkpoint.pt",
        weight_decay=0.03,
        finish=lambda: save_model(var, folder / "var.safetensors"),
    )


def train_classifier(recipe: Recipe, folder: Path, device: torch.device) -> None:
    """Train the digit classifier."""
    torch.manual_seed(recipe.seed + 4)
    classifier = DigitClassifier().to(device)

    def loss(step: int) -> Tensor:
        images, labels = digits.real_batch(recipe.batch_size)
        return F.cross_entropy(classifier(images.to(device)), labels.to(device))

    def save() -> None:
        write_tensors(folder / "classifier.safetensors", classifier.state_dict())

    fit(
        "digit classifier",
        classifier,
        loss,
        steps=recipe.classifier_steps,
        learning_rate=2e-3,
        seed=recipe.seed + 5,
        checkpoint=folder / "classifier.checkpoint.pt",
        finish=save,
    )


def write_real_tokens(recipe: Recipe, folder: Path, device: torch.device, out: Path) -> TokenMaps:
    """Write the dataset of real digits to the folder ``out``. Each batch has its own seed for choice and jitter."""
    vae = load_vae(folder / "vae.safetensors", device=device)
    seed = recipe.seed + 6
    source = {"images": "digits of scikit-learn, jittered", "seed": seed, "vae": checkpoint_facts(folder, "vae")}

    def digits_of(batches: Sequence[range]) -> Iterator[Batch]:
        for numbers in batches:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + numbers.start)
            images, labels = digits.real_batch(len(numbers), generator)
            with torch.inference_mode():
                maps = vae.img_to_idxBl(images.to(device))
            yield Batch(maps, labels)

    manifest = Manifest(PATCH_NUMS, vae.vocab_size, digits.NUM_CLASSES, recipe.real_maps, source, **BATCHES)
    write_token_maps(out, manifest, digits_of, "encoding real digits")
    return TokenMaps.open(out)


def write_generated_tokens(
    recipe: Recipe,
    folder: Path,
    device: torch.device,
    out: Path,
    search: Search | None = None,
    search_facts: Mapping[str, Any] | None = None,
) -> TokenMaps:
    """Write a dataset of generated digits to the folder ``out``, with the same number of images per class.

    With a ``search``, ``search_facts`` are JSON values that identify its scorers.
    """
    var = load_var(folder / "var.safetensors", vae=folder / "vae.safetensors", device=device)
    generate_token_maps(
        out,
        var,
        per_class=recipe.generated_maps // digits.NUM_CLASSES,
        search=search,
        seed=recipe.sampling_seed,
        provenance={**{name: checkpoint_facts(folder, name) for name in ("var", "vae")}, **(search_facts or {})},
        top_k=0,
        **SAMPLING,
        **BATCHES,
    )
    return TokenMaps.open(out)


def checkpoint_facts(folder: Path, name: str) -> dict[str, str]:
    path = folder / f"{name}.safetensors"
    return {"file": path.name, "sha256": file_sha256(path)}


def resample_with(scorer: Path, device: torch.device, m: int = RESAMPLED_M) -> tuple[Search, dict[str, Any]]:
    """The search that draws maps for a scorer on top of the one of this file, and its facts."""
    search = BestOfM(Scorer.from_pretrained(scorer, device=device), m=m, pick="resample")
    return search, {"scorers": [checkpoint_facts(scorer.parent, scorer.stem)], "pick": search.pick}


def train_scorer(recipe: Recipe, folder: Path, device: torch.device) -> None:
    """Write token maps of real and of generated digits, and train the scorer on them."""
    real = write_real_tokens(recipe, folder, device, folder / "tokens" / "real")
    generated = write_generated_tokens(recipe, folder, device, folder / "tokens" / "generated")
    train_on(real, generated, recipe, folder / "scorer.safetensors", device)


def train_second_scorer(recipe: Recipe, folder: Path, device: torch.device) -> None:
    """Write token maps that a search with the scorer resampled, and train a second scorer on them, with other seeds."""
    real = write_real_tokens(recipe, folder, device, folder / "tokens" / "real")
    again = replace(recipe, seed=recipe.seed + 50, sampling_seed=recipe.sampling_seed + 5)
    search = resample_with(folder / "scorer.safetensors", device)
    generated = write_generated_tokens(again, folder, device, folder / "tokens" / "resampled", *search)
    train_on(real, generated, again, folder / "second.safetensors", device)


def train_on(real: TokenMaps, generated: TokenMaps, recipe: Recipe, out: Path, device: torch.device) -> None:
    """Train a scorer to the file ``out``, beside the VQ-VAE of the maps."""
    maker = FeatureMaker.of_quantizer(load_vae(out.parent / "vae.safetensors").quantize)
    scorer_training.train_scorer(real, generated, maker, SCORER_SIZES, recipe.scorer_training(), out, device=device)


STAGES: dict[str, Callable[[Recipe, Path, torch.device], None]] = {
    "vae": train_vae,
    "var": train_var,
    "classifier": train_classifier,
    "scorer": train_scorer,
    "second": train_second_scorer,
}


def train(folder: Path, recipe: Recipe | None = None, device: torch.device | str = "cpu") -> None:
    """Run every stage whose weights are missing in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = recipe or Recipe()
    for name, stage in STAGES.items():
        if not (folder / f"{name}.safetensors").exists():
            torch.manual_seed(recipe.seed)
            stage(recipe, folder, torch.device(device))


def load_classifier(folder: Path, device: torch.device | str = "cpu") -> nn.Module:
    """The classifier that :func:`train_classifier` wrote."""
    classifier = DigitClassifier()
    classifier.load_state_dict(load_file(folder / "classifier.safetensors"), strict=True)
    return classifier.to(device).eval().requires_grad_(False)
