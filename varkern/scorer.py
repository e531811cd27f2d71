"""The scorer S(c, e_k, k) of LSRS, as published: a small CNN that distinguishes real from generated features."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn

from varkern import hub
from varkern.cards import find_base_scorers, model_card, read_facts
from varkern.models.loading import count_modules, read_metadata, read_state_dict
from varkern.runs import write_json, write_tensors, write_text
from varkern.scorer_layers import SLOPE, ResidualBlock, WideLinear, autocasting, initialise, no_autocast

FINAL_SIDE = 2  # the last stage gives 2x2 features, as in the paper
FIRST_WIDTHS = (64, 128)  # of the published stages; every further stage has 256 channels


def stage_sides(size: int) -> tuple[int, ...]:
    """The side after each stage, for a latent of side ``size``: each stage halves it, rounded up, until it is 2."""
    sides = []
    while size > FINAL_SIDE:
        size = (size + 1) // 2
        sides.append(size)
    return tuple(sides)


def default_widths(size: int) -> tuple[int, ...]:
    """Channels of each stage for a latent of side ``size``: 64, 128, then 256 (the published ones at 16)."""
    return (FIRST_WIDTHS + (256,) * size)[: len(stage_sides(size))]


@dataclass(frozen=True)
class ScorerConfig:
    """Sizes of a scorer; the defaults are the published ones, for VAR at 256 px (4,007,425 parameters).

    Args:
        num_classes: number of classes of the scored model.
        num_scales: K, its number of scales.
        channels: C, the width of its codes.
        size: side of its latent, at least 3. Each stage halves it, rounded up, until it is 2.
        widths: channels of each stage; None: 64, 128, then 256 for as many stages as ``size`` needs.
        embedding: width of the class embedding and of the scale embedding.
        hidden: widths of the MLP's layers, without the single output.
        dropout: probability of the dropout after each stage, in training only.

    Raises:
        ValueError: if ``widths`` and ``size`` do not fit, or ``hidden`` is empty.

    Example::

        >>> varkern.ScorerConfig(num_classes=10, num_scales=5, channels=16, size=6, widths=(32, 64)).size
        6
    """

    num_classes: int = 1000
    num_scales: int = 10
    channels: int = 32
    size: int = 16
    widths: tuple[int, ...] | None = None
    embedding: int = 128
    hidden: tuple[int, ...] = (512, 256, 128)
    dropout: float = 0.05

    def __post_init__(self) -> None:
        stages = len(stage_sides(self.size))
        if not stages:
            raise ValueError(f"size must be at least {FINAL_SIDE + 1}, got {self.size}")
        widths = default_widths(self.size) if self.widths is None else tuple(self.widths)
        object.__setattr__(self, "widths", widths)
        object.__setattr__(self, "hidden", tuple(self.hidden))
        if len(widths) != stages:
            raise ValueError(
                f"widths must have one number for each of the {stages} stages that halve size={self.size} "
                f"down to {FINAL_SIDE}, got {len(widths)}"
            )
        if not self.hidden:
            raise ValueError("hidden must have at least one width, got none")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")


class Scorer(nn.Module):
    """Scores token maps by their fused features: a higher score means closer to real images.

    Trained with either loss of the paper, a scorer tends to ``log p_real(e) / p_generated(e)`` plus a constant of class
    and scale; :class:`varkern.BestOfM` says what follows from this.

    The names and shapes of its weights are those of the published ``RewardNet``, so the state dict of one loads into
    the other.

    The dtype of the weights decides the precision: ``Scorer.from_pretrained(path, dtype=torch.bfloat16)`` runs the
    convolutions in bfloat16, whatever the autocast mode. Autocast only affects float32 weights. The MLP always computes
    in float32, because in bfloat16, which has 128 numbers from 4 to 8, the scores of many candidates would be equal.
    Convolutions and their weights are channels-last.

    Args:
        config: sizes; None: the published ones, for VAR at 256 px.

    Example::

        >>> features = torch.randn(8, 4, 16, 6, 6)  # eight images, four candidates
        >>> scorer(labels, features, 2).shape
        torch.Size([8, 4])
    """

    config: ScorerConfig
    class_label_embedding: nn.Embedding
    class_label_proj: WideLinear
    stage_label_embedding: nn.Embedding
    stage_label_proj: WideLinear
    fuser: nn.Sequential
    out_proj: WideLinear
    channels_last: bool = True
    """Searches pass features in this memory format, so that :meth:`forward` need not convert them."""
    metadata: Mapping[str, str] = MappingProxyType({})
    """Texts by name from the scorer's file. ``"training"`` has the facts of its training, from which the model card is
    made. :meth:`save_pretrained` writes all of them again; assign ``{}`` if you train the weights further."""

    def __init__(self, config: ScorerConfig | None = None):
        super().__init__()
        self.config = config = config or ScorerConfig()
        assert config.widths is not None, "its __post_init__ replaces None"
        before = config.channels
        for i, (width, side) in enumerate(zip(config.widths, stage_sides(config.size), strict=True)):
            blocks = ResidualBlock(before, width, side, stride=2), ResidualBlock(width, width, side)
            self.add_module(f"conv_stage_{i + 1}", nn.Sequential(*blocks, nn.Dropout(config.dropout)))
            before = width
        self.class_label_embedding = nn.Embedding(config.num_classes, config.embedding)
        self.class_label_proj = WideLinear(config.embedding, config.embedding)
        self.stage_label_embedding = nn.Embedding(config.num_scales, config.embedding)
        self.stage_label_proj = WideLinear(config.embedding, config.embedding)
        layers, joined = [], before * FINAL_SIDE**2 + 2 * config.embedding
        for wide, narrow in zip((joined, *config.hidden), config.hidden, strict=False):
            layers += [WideLinear(wide, narrow), nn.LeakyReLU(SLOPE)]
        self.fuser = nn.Sequential(*layers[:-1])
        self.out_proj = WideLinear(config.hidden[-1], 1)
        initialise(self)
        self.to(
            memory_format=torch.channels_last
        )  # after the weights are drawn, because they are drawn in memory order

    @property
    def on_top_of(self) -> tuple[str, ...]:
        """The names of the scorers to which this one adds, as its training recorded them; usually none.

        It was trained on maps that were resampled by their scores, and its scores have a meaning in a
        :class:`varkern.SumOfScorers` with them.
        """
        try:
            return tuple(find_base_scorers(read_facts(self.metadata)))
        except ValueError:  # metadata of another program
            return ()

    @property
    def temperatures(self) -> tuple[float, ...] | None:
        """The fitted temperature of every scale, which ``varkern scorer report --save-temperatures`` adds to a file.

        Searches use them with ``temperature="fitted"``. None: the file has none.

        Raises:
            ValueError: if the metadata do not have a number > 0 for each scale.
        """
        if (text := self.metadata.get("temperatures")) is None:
            return None
        count = self.config.num_scales
        try:
            values = tuple(float(value) for value in json.loads(text))
        except (ValueError, TypeError):
            values = ()
        if len(values) != count or not all(0 < value < math.inf for value in values):
            raise ValueError(f"temperatures in a scorer's metadata must be {count} numbers > 0, got {text[:80]!r}")
        return values

    @property
    def stages(self) -> list[nn.Sequential]:
        """The convolutional stages, in order."""
        numbers = range(1, 1 + len(stage_sides(self.config.size)))
        return [cast(nn.Sequential, self.get_submodule(f"conv_stage_{number}")) for number in numbers]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the convolutions: that of the weights, or autocast's if it is on and the weights are float32."""
        weight = self.out_proj.weight
        if weight.dtype == torch.float32 and autocasting(weight):
            return torch.get_autocast_dtype(weight.device.type)
        return weight.dtype

    @property
    def input_dtype(self) -> torch.dtype:
        """Searches pass features in this dtype, which needs no conversion. Float32 if the weights are float64."""
        return torch.float32 if self.dtype == torch.float64 else self.dtype

    def forward(self, labels: Tensor, features: Tensor, scale: int | Tensor) -> Tensor:
        """S(c, e_k, k) of every candidate.

        Args:
            labels: classes ``[B]`` int64.
            features: fused features ``[B, M, C, H, W]``, any float dtype and memory format.
            scale: the scale that all candidates belong to, or one per candidate, ``[M]`` or ``[B, M]`` int64.

        Returns:
            scores ``[B, M]`` float32, or float64 if the weights are.
        """
        batch, candidates = features.shape[:2]
        dtype = self.dtype
        x = features.flatten(0, 1).to(dtype=dtype, memory_format=torch.channels_last)
        lowered = dtype != self.out_proj.weight.dtype
        with contextlib.nullcontext() if lowered else no_autocast(x):
            for stage in self.stages:
                x = stage(x)
        if not isinstance(scale, Tensor):
            scale = torch.full(
                (), scale, device=labels.device
            )  # on the device, because a copy from the host would wait
        wide = torch.promote_types(dtype, torch.float32)
        with no_autocast(x):
            # Each image's class and each given scale is projected once and then repeated for the candidates.
            classes = self.class_label_proj(self.class_label_embedding(labels).to(wide))
            scales = self.stage_label_proj(self.stage_label_embedding(scale).to(wide))
            conditions = [c.expand(batch, candidates, -1).flatten(0, 1) for c in (classes.unsqueeze(1), scales)]
            joined = torch.cat([x.flatten(1).to(wide), *conditions], dim=1)
            return self.out_proj(self.fuser(joined)).view(batch, candidates)

    def save_pretrained(self, path: str | os.PathLike[str], metadata: dict[str, str] | None = None) -> None:
        """Write weights and config. After a crash the former file is still complete.

        Args:
            path: a ``.safetensors`` file; or a folder for the hub, which gets ``model.safetensors``, ``config.json``
                and, unless it has one, the model card ``README.md``.
            metadata: texts by name to add to :attr:`metadata` in the file.

        Raises:
            ValueError: if ``path`` has the suffix of another format.
            OSError: if a file cannot be written.
        """
        path = Path(path)
        if path.suffix in (".pth", ".pt", ".bin", ".ckpt"):
            raise ValueError(f"path must be a .safetensors file or a folder, got {path}")
        if path.suffix == ".safetensors":
            config = {"config": json.dumps(asdict(self.config))}
            write_tensors(path, self.state_dict(), {**self.metadata, **(metadata or {}), **config})
        else:
            self.write_folder(path, metadata)

    def write_folder(self, folder: Path, metadata: dict[str, str] | None = None, repository: str = "user/repo") -> None:
        """Write the files of a repository; its name stands in the model card."""
        folder.mkdir(parents=True, exist_ok=True)
        self.save_pretrained(folder / hub.WEIGHTS, metadata)
        write_json(folder / hub.CONFIG, asdict(self.config))
        if not (folder / hub.CARD).exists():
            card = model_card(asdict(self.config), {**self.metadata, **(metadata or {})}, repository)
            write_text(folder / hub.CARD, card)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload weights, config and model card to the Hugging Face hub in one commit.

        The model card has what the training recorded: data, settings and accuracy per scale. It replaces the card of
        the repository; ``ignore_patterns="README.md"`` keeps that one.

        Args:
            repo_id: name of the repository, ``"user/repo"``; it is made if it does not exist.
            options: of ``huggingface_hub.ModelHubMixin.push_to_hub``: ``private``, ``token``, ``branch``,
                ``commit_message``, ``create_pr`` and more.

        Returns:
            the address of the commit.

        Raises:
            ImportError: if huggingface_hub, the extra ``hub``, is not installed.
            ValueError: if ``repo_id`` is not such a name.
        """
        if not hub.is_repository(repo_id):
            raise ValueError(f"repo_id must be a name such as user/repo, got {repo_id!r}")
        return hub.upload(lambda folder: self.write_folder(folder, repository=repo_id), repo_id, **options)

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> Scorer:
        """Read a scorer, in evaluation mode and without gradients.

        Args:
            source: a ``.safetensors`` file that :meth:`save_pretrained` wrote; or a state dict of the published
                network, ``.pth`` (read with ``weights_only=True``) or ``.safetensors``, whose shapes give the sizes
                (for an even latent side); or a folder, or the name of a repository on the hub, ``"user/repo"`` or
                ``"user/repo@revision"``, which holds ``scorer.safetensors``, ``model.safetensors`` or
                ``scoring_model.pth``. An existing local path has precedence.
            device: the device of the weights; :class:`varkern.BestOfM` moves a scorer to its model's device.
            dtype: the dtype of the weights and of the convolutions. On a GPU bfloat16 halves the bytes; the error of
                its scores is a few hundredths of their spread, which changes few choices.
            revision: branch, tag or commit of the repository; None: the newest commit of its main branch.
            token, cache_dir, force_download, local_files_only: of ``huggingface_hub.hf_hub_download``; they have no
                effect on a local path.

        Raises:
            FileNotFoundError: if the path, repository or revision does not exist, or does not hold a scorer.
            ValueError: if the file does not hold a scorer, or ``revision`` is given for a path.
            OSError: if the hub cannot be reached, or does not give access.
            ImportError: if a hub name needs the ``hub`` extra.
        """
        options = {"token": token, "cache_dir": cache_dir, "force_download": force_download}
        path = hub.locate(source, revision, local_files_only=local_files_only, **options)
        try:
            state, config = read_state_dict(path)
            scorer = cls(ScorerConfig(**(config or config_of_state(state))))
            scorer.load_state_dict(state, strict=True)
        except Exception as error:
            raise ValueError(f"{path} is not a scorer's file: {error}") from error
        scorer.metadata = {name: text for name, text in read_metadata(path).items() if name != "config"}
        return scorer.to(device=device, dtype=dtype).eval().requires_grad_(False)


def config_of_state(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of :class:`ScorerConfig`, from the shapes of a state dict; the latent's side is assumed to be even.

    Raises:
        KeyError: if a weight that is needed for a size is missing.
    """
    stages = sum(f"conv_stage_{i + 1}.0.conv1.weight" in state for i in range(len(state)))
    first = state["conv_stage_1.0.conv1.weight"]
    num_classes, embedding = state["class_label_embedding.weight"].shape
    layers = range(0, 2 * count_modules(state, "fuser"), 2)
    return {
        "num_classes": num_classes,
        "num_scales": state["stage_label_embedding.weight"].shape[0],
        "channels": first.shape[1],
        "size": 2 * state["conv_stage_1.0.ln1.weight"].shape[-1],
        "widths": [state[f"conv_stage_{i + 1}.0.conv1.weight"].shape[0] for i in range(stages)],
        "embedding": embedding,
        "hidden": [state[f"fuser.{i}.weight"].shape[0] for i in layers],
    }
