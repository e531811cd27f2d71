"""Training of a scorer on pairs of real and generated token maps (LSRS, section 3.3 and appendix A)."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from varkern import cards
from varkern.data import TokenMaps
from varkern.models.loading import read_metadata
from varkern.runs import Ranks, check_file, check_settings, join_ranks
from varkern.scorer import Scorer, ScorerConfig

from .best import BestWeights
from .features import FeatureMaker
from .log import Log, Stopwatch
from .loop import fit, schedule
from .pairs import Batch, Pairs, check_datasets, fingerprint, make_pairs
from .recipe import LOSSES, ScorerTraining, wins


class Trainer:
    """A scorer, its data and its figures, with the functions that :func:`.loop.fit` calls at each step.

    Args:
        scorer: the scorer, trained in place, on the device of the ranks.
        pairs: the pairs to train on.
        maker: computes the scorer's input from token maps.
        training: the settings of the training.
        ranks: the processes that share every batch.
        table: the CSV file of the figures.
        every: number of steps between two rows of the CSV; the end of an epoch also gets a row.
    """

    def __init__(
        self,
        scorer: Scorer,
        pairs: Pairs,
        maker: FeatureMaker,
        training: ScorerTraining,
        ranks: Ranks,
        table: Path,
        every: int,
    ):
        self.scorer, self.pairs, self.maker, self.training = scorer, pairs, maker, training
        self.ranks, self.table, self.every = ranks, table, every
        self.examples = len(pairs.training)
        self.num_steps, self.warmup = training.steps(self.examples)
        self.scales = torch.arange(training.first_scale, len(maker.patch_nums), device=ranks.device)
        self.loss, self.half = LOSSES[training.loss], training.precision_on(ranks.device) == "bfloat16"
        if training.loss == "pairwise":
            # Eq. 4 does not depend on a constant added to all scores, so the gradient of this bias is only rounding.
            scorer.out_proj.bias.requires_grad_(False).zero_()
        self.model: nn.Module = scorer
        if ranks.size > 1:
            on_gpu = [ranks.device] if ranks.device.type == "cuda" else None
            self.model = DistributedDataParallel(scorer, device_ids=on_gpu)
        self.losses = torch.zeros(2, dtype=torch.float64, device=ranks.device)  # sum and count since the last row
        self.watch, self.log = Stopwatch(ranks.device), None
        self.steps_timed, self.seconds, self.since = 0, 0.0, None
        self.figures: dict[str, Any] = {}
        self.best = BestWeights(scorer, training.best_by, len(self.scales)) if training.best_by else None

    def begin(self, start: int) -> None:
        steps, size = range(start, self.num_steps), self.training.batch_size
        self.batches = self.pairs.training.batches(steps, size, self.ranks.rank, self.ranks.size)
        if self.ranks.rank == 0:
            self.log = Log(self.table, self.columns(), start)
        if start == self.num_steps and len(self.pairs.validation):  # the run was killed after its last step
            self.figures = {"step": start, "validation": self.validate()}

    def close(self) -> None:
        if self.log is not None:
            self.log.close()

    def features(self, batch: Batch) -> Tensor:
        """Features of the real maps' scales, then of the generated maps' scales, ``[n, 2 * scales, C, H, W]``."""
        return torch.cat([self.maker(tokens, self.training.first_scale) for tokens in batch[:2]], dim=1)

    def scores(self, model: nn.Module, labels: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of the real and of the generated maps, ``[n, scales]`` float32 each."""
        with torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=self.half):
            scores = model(labels, features, self.scales.repeat(2))
        return scores.float().chunk(2, dim=1)

    def batch_loss(self, step: int) -> Tensor:
        if self.since is None:
            self.since = time.perf_counter()
        self.watch.start(step)
        batch = next(self.batches).to(self.ranks.device)
        self.watch.lap("data")
        features = self.features(batch)
        self.watch.lap("fuse")
        loss = self.loss(*self.scores(self.model, batch.labels, features)).mean()
        self.losses += torch.stack((loss.detach().double(), torch.ones_like(loss, dtype=torch.float64)))
        return loss

    def after_step(self, step: int) -> None:
        self.watch.lap("model")
        self.steps_timed += 1
        seen, last = (step + 1) * self.training.batch_size, step + 1 == self.num_steps
        new_epoch = seen // self.examples > (seen - self.training.batch_size) // self.examples
        if new_epoch or last or (step + 1) % self.every == 0:
            self.write_row(step, validated=new_epoch or last)

    def write_row(self, step: int, validated: bool) -> None:
        self.seconds += time.perf_counter() - self.since
        total = self.ranks.sum(self.losses.clone())
        self.losses.zero_()
        row = {
            "step": step + 1,
            "epoch": (step + 1) * self.training.batch_size / self.examples,
            "learning_rate": self.training.learning_rate * schedule(step, self.num_steps, self.warmup),
            "loss": float(total[0] / total[1]),
            "examples_per_second": self.steps_timed * self.training.batch_size / self.seconds,
            **{f"{phase}_share": share for phase, share in self.watch.shares().items()},
        }
        self.figures |= row
        if validated and len(self.pairs.validation):
            self.figures["validation"] = self.validate()
            if self.best is not None:
                self.best.offer(self.scorer, step + 1, self.figures["validation"])
            for name, values in self.figures["validation"].items():
                numbers = zip(self.scales.tolist(), values, strict=True)
                row |= {f"validation_{name}_{scale}": value for scale, value in numbers}
        if self.log is not None:
            self.log.write(row)
        self.since = None

    def columns(self) -> list[str]:
        names = ["step", "epoch", "learning_rate", "loss", "examples_per_second"]
        names += ["data_share", "fuse_share", "model_share"]
        return names + [f"validation_{name}_{k}" for name in ("loss", "accuracy") for k in self.scales.tolist()]

    @torch.no_grad()
    def validate(self) -> dict[str, list[float]]:
        """Loss and accuracy on the held-out part, one number per scale; see :func:`.recipe.wins`."""
        sums = torch.zeros(3, len(self.scales), dtype=torch.float64, device=self.ranks.device)
        self.scorer.eval()
        share = max(self.training.batch_size // self.ranks.size, 1)
        for batch in self.pairs.validation.fixed_batches(share, self.ranks.rank, self.ranks.size):
            batch = batch.to(self.ranks.device)
            real, generated = self.scores(self.scorer, batch.labels, self.features(batch))
            columns = (self.loss(real, generated), wins(real, generated), torch.ones_like(real))
            sums += torch.stack(columns).double().sum(1)
        self.scorer.train()
        loss, accuracy, count = self.ranks.sum(sums).cpu()
        return {"loss": (loss / count).tolist(), "accuracy": (accuracy / count).tolist()}


def check_maker(real: TokenMaps, maker: FeatureMaker) -> None:
    """Raise ``ValueError`` if the VQ-VAE does not fit the token maps."""
    sides, vocabulary = tuple(real.manifest.patch_nums), maker.codebook.shape[0]
    if maker.patch_nums != sides:
        raise ValueError(f"vae has patch_nums {maker.patch_nums}, but the token maps have {sides}")
    if vocabulary != real.manifest.vocabulary:
        raise ValueError(f"vae has {vocabulary} codes, but the token maps a vocabulary of {real.manifest.vocabulary}")


def check_fit(real: TokenMaps, maker: FeatureMaker, config: ScorerConfig, first_scale: int) -> None:
    """Raise ``ValueError`` if the VQ-VAE, the scorer or the first scale does not fit the token maps."""
    check_maker(real, maker)
    scales = len(maker.patch_nums)
    if not 0 <= first_scale < scales:
        raise ValueError(f"first_scale must be in 0..{scales - 1}, the scales of the token maps, got {first_scale}")
    wanted = {
        "num_classes": real.manifest.num_classes,
        "num_scales": scales,
        "channels": maker.codebook.shape[1],
        "size": maker.patch_nums[-1],
    }
    for name, value in wanted.items():
        if getattr(config, name) != value:
            raise ValueError(f"the scorer's {name} must be {value} for these token maps, got {getattr(config, name)}")


def describe_maps(maps: TokenMaps) -> dict[str, Any]:
    """Describe a dataset for the facts: its size and its source, with the length of long lists such as all classes."""
    source = {
        name: f"{len(value)} values" if isinstance(value, list) and len(value) > cards.LONGEST_LIST else value
        for name, value in maps.manifest.source.items()
    }
    return {"images": len(maps), "patch_nums": list(maps.manifest.patch_nums), **source}


def read_facts(path: Path) -> dict[str, Any]:
    """Read the facts that :func:`train_scorer` wrote to a scorer's file; empty if the file has none.

    Raises:
        ValueError: if it is not a readable safetensors file.
    """
    try:
        return cards.read_facts(read_metadata(path))
    except Exception as error:
        raise ValueError(f"{path} is not a scorer's safetensors file: {error}") from error


def train_scorer(
    real: TokenMaps,
    generated: TokenMaps,
    maker: FeatureMaker,
    config: ScorerConfig,
    training: ScorerTraining,
    out: Path,
    *,
    device: torch.device | str = "cpu",
    every: int = 100,
    restart: bool = False,
) -> dict[str, Any]:
    """Train a scorer and write it to ``out``, continuing a killed run. A finished ``out`` is not trained again.

    Under ``torchrun`` the ranks share every batch. Without dropout the result equals that of one rank to rounding; with
    dropout every rank draws its own masks.

    Args:
        real, generated: token maps of real images and of the model's samples.
        maker: computes the scorer's input from token maps, with the VQ-VAE that made them.
        config: sizes of the scorer.
        training: settings of the training.
        out: a ``.safetensors`` file. The checkpoint of an unfinished run, the CSV and TensorBoard's files have the same
            name with other suffixes.
        device: the device to train on; see :func:`varkern.runs.join_ranks`.
        every: number of steps between two rows of the CSV.
        restart: remove ``out`` and the files of an unfinished run, and start again.

    Returns:
        the facts, which the file's metadata also hold: settings, steps, the last loss, loss and accuracy by scale of
        the validation, examples (pairs) per second, and the shares of time.

    Raises:
        ValueError: if the arguments do not fit each other, or ``out`` or its checkpoint was made with other settings.
        OSError: if a file cannot be written.
    """
    check_datasets(real, generated)
    check_fit(real, maker, config, training.first_scale)
    check_file("out", out, ".safetensors")
    with join_ranks(torch.device(device)) as ranks:
        if training.batch_size % ranks.size:
            raise ValueError(f"batch_size must be a multiple of the {ranks.size} ranks, got {training.batch_size}")
        settings = {
            **asdict(training),
            "precision": training.precision_on(ranks.device),
            "real": fingerprint(real),
            "generated": fingerprint(generated),
            "vae": maker.fingerprint(),
            "scorer": asdict(config),
        }
        settings = json.loads(json.dumps(settings))
        checkpoint = out.with_suffix(".checkpoint.pt")
        if restart and ranks.rank == 0:
            for path in (out, checkpoint, out.with_suffix(".csv")):
                path.unlink(missing_ok=True)
        ranks.agree("restart", restart)
        ranks.agree(f"{out} is there", out.exists())
        if out.exists():
            facts = read_facts(out)
            check_settings(out, facts.get("settings", {}), settings, "choose another file or restart")
            checkpoint.unlink(missing_ok=True)
            return facts
        ranks.agree(f"{checkpoint} is there", checkpoint.exists())
        return run(real, generated, maker.to(ranks.device), config, training, out, ranks, every, settings)


def run(
    real: TokenMaps,
    generated: TokenMaps,
    maker: FeatureMaker,
    config: ScorerConfig,
    training: ScorerTraining,
    out: Path,
    ranks: Ranks,
    every: int,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Train a scorer; the arguments are those of :func:`train_scorer`, already checked."""
    torch.manual_seed(training.seed)
    scorer = Scorer(config).to(ranks.device)
    shares = training.pair_share, training.validation_pairs
    pairs = make_pairs(real, generated, training.validation, training.seed, *shares)
    if training.best_by is not None and not len(pairs.validation):
        raise ValueError(f"best_by={training.best_by!r} needs held-out pairs, got none: no class has two images")
    trainer = Trainer(scorer, pairs, maker, training, ranks, out.with_suffix(".csv"), every)
    facts: dict[str, Any] = {"settings": settings, "pairs": len(pairs.training), "held_out": len(pairs.validation)}
    facts |= {"left_out": pairs.left_out, "ranks": ranks.size, "device": str(ranks.device)}
    facts["data"] = {"real": describe_maps(real), "generated": describe_maps(generated)}

    def finish() -> None:
        if trainer.best is not None:
            trainer.figures |= trainer.best.restore(scorer)
        facts.update(trainer.figures)
        scorer.save_pretrained(out, {"training": json.dumps(facts)})

    try:
        fit(
            "scorer",
            scorer,
            trainer.batch_loss,
            steps=trainer.num_steps,
            learning_rate=training.learning_rate,
            seed=training.seed,
            checkpoint=out.with_suffix(".checkpoint.pt"),
            warmup=trainer.warmup,
            weight_decay=training.weight_decay,
            betas=training.betas,
            eps=training.eps,
            max_norm=training.max_norm,
            after_step=trainer.after_step,
            carried={"losses": trainer.losses, **(trainer.best.tensors() if trainer.best is not None else {})},
            settings=settings,
            begin=trainer.begin,
            finish=finish,
            main=ranks.rank == 0,
        )
    finally:
        trainer.close()
    return {**facts, **trainer.figures}
