"""What the command's tests share: a small model on disk, and ``varkern sample`` on it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from varkern import cli
from varkern.models import VAR, VQVAE
from varkern.models.loading import save_model
from varkern.scorer import Scorer, ScorerConfig

PATCH_NUMS = (1, 2, 4)
CLASSES = 12
SCORER = {"num_classes": CLASSES, "num_scales": 3, "channels": 8, "size": 4, "widths": (8,), "embedding": 4}


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A small random VAR with logits far from flat, its VQ-VAE, a scorer, and files that are none of these."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    vae = VQVAE(
        vocab_size=64, z_channels=8, ch=8, ch_mult=(1, 1), num_res_blocks=1, norm_groups=4, v_patch_nums=PATCH_NUMS
    )
    var = VAR(vae, num_classes=CLASSES, depth=2, embed_dim=16, num_heads=2, patch_nums=PATCH_NUMS)
    with torch.no_grad():
        var.head.weight.normal_(std=1.0)
    save_model(vae, folder / "vae.safetensors")
    save_model(var, folder / "var.safetensors")
    Scorer(ScorerConfig(**SCORER, hidden=(8,))).save_pretrained(folder / "scorer.safetensors")
    Scorer(ScorerConfig(**{**SCORER, "channels": 4}, hidden=(8,))).save_pretrained(folder / "other_scorer.safetensors")
    save_file({"weight": torch.zeros(2)}, folder / "other.safetensors")
    (folder / "garbage.pth").write_bytes(b"no checkpoint")
    return folder


@pytest.fixture
def command(weights, tmp_path):
    """``varkern sample`` on the small models, with options changed by keyword (None: left out); its exit code."""

    def run(out: Path = tmp_path / "out", **options) -> int:
        settings = {
            "var": weights / "var.safetensors",
            "vae": weights / "vae.safetensors",
            "scorer": weights / "scorer.safetensors",
            "classes": "3,7",
            "m": 3,
            "seed": 5,
            "num_per_class": 3,
            "batch_size": 4,
            "device": "cpu",
            "out": out,
            **options,
        }
        arguments = ["sample"]
        for name, value in settings.items():
            for one in value if isinstance(value, list) else [value]:
                if one is not None:
                    arguments += [f"--{name.replace('_', '-')}", str(one)]
        return cli.main(arguments)

    return run


@pytest.fixture
def second_scorer(tmp_path) -> Path:
    """A scorer of the same sizes as that of ``weights``."""
    torch.manual_seed(1)
    Scorer(ScorerConfig(**SCORER, hidden=(8,))).save_pretrained(tmp_path / "second.safetensors")
    return tmp_path / "second.safetensors"


@pytest.fixture
def scorer_on_top(second_scorer) -> Path:
    """The same, as if it were trained on maps that the scorer of ``weights`` resampled."""
    generated = {"pick": "resample", "scorers": [{"file": "scorer.safetensors", "sha256": "ab"}]}
    metadata = {"training": json.dumps({"data": {"generated": generated}})}
    path = second_scorer.with_name("on-top.safetensors")
    Scorer.from_pretrained(second_scorer).save_pretrained(path, metadata)
    return path


@pytest.fixture
def one_line(capsys):
    """Gives the single line on stderr, which no traceback is."""

    def read() -> str:
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and error.startswith("varkern: ") and "Traceback" not in error, error
        return error.strip()

    return read
