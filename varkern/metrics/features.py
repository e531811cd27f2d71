"""Feature extractors: the published suite's Inception network, or a user's function."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from varkern.extras import import_named

SPATIAL_CHANNELS = 7  # the published suite computes sFID from the first 7 channels of a layer


class Extracted(NamedTuple):
    """An extractor's result for N images."""

    features: Tensor
    """``[N, D]`` float, for FID, precision and recall."""
    logits: Tensor | None
    """``[N, classes]`` float, before the softmax, for the Inception score; None: the extractor has none."""
    spatial: Tensor | None = None
    """``[N, S]`` float, features that depend on position, for sFID; None: the extractor has none."""


class Extractor(NamedTuple):
    """A function of images ``[N, 3, H, W]`` uint8 on ``device``; ``name`` is stored with its statistics."""

    name: str
    function: Callable[[Tensor], Extracted | tuple[Tensor, Tensor | None]]
    device: torch.device

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Extracted:
        """Features of images ``[N, 3, H, W]`` uint8.

        Raises:
            ValueError: if the function does not return :class:`Extracted` or ``(features, logits)``.
        """
        returned = self.function(images.to(self.device))
        if not isinstance(returned, tuple) or not 2 <= len(returned) <= 3:
            raise ValueError(f"features {self.name} must return (features, logits), got {type(returned).__name__}")
        extracted = Extracted(*returned)
        for name, part in zip(Extracted._fields, extracted, strict=True):
            if part is None and name != "features":
                continue
            if not isinstance(part, Tensor) or part.dim() != 2 or len(part) != len(images):
                came = list(part.shape) if isinstance(part, Tensor) else type(part).__name__
                raise ValueError(f"features {self.name} must return {name} of shape [{len(images)}, D], got {came}")
            if not part.is_floating_point():
                raise ValueError(f"features {self.name} must return {name} as floats, got {part.dtype}")
        return extracted


def from_name(name: str, device: torch.device) -> Extractor:
    """A user's function by ``module:function``. Modules in the working directory are found too.

    The function takes images ``[N, 3, H, W]`` uint8 on ``device`` and returns ``(features [N, D], logits [N, classes]
    or None)``; an :class:`Extracted` may add spatial features.

    Raises:
        ValueError: if the module or function does not exist.
    """
    wanted = "features must be inception, demo or module:function"
    function = import_named(wanted, name)
    if not callable(function):
        raise ValueError(f"{wanted}, got {name!r}, which is no function")
    return Extractor(name, function, device)


def inception(device: torch.device, weights: Path | None = None) -> Extractor:
    """The Inception network of the published suites (2015-12-05), as converted by torch-fidelity.

    The features are the 2,048 of ``pool_3``. The logits are the 1,008 without their bias, as in the published score.
    The spatial features are the first 7 channels of ``mixed_6/conv``, 17x17, in the order rows, columns, channels.
    Images of any size are resized to 299x299 as in the published network.

    Args:
        device: the network's device.
        weights: torch-fidelity's file of weights (``weights-inception-2015-12-05-6726825d.pth``); None: it is
            downloaded.

    Raises:
        ImportError: if torch-fidelity is missing or cannot be imported.
        ValueError: if ``weights`` is not a file of Inception weights.
        OSError: if ``weights`` cannot be read or downloaded.

    Source:
        Layers: ``evaluations/evaluator.py`` of openai/guided-diffusion.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
    except ImportError as error:
        raise ImportError(
            f"Inception features need torch-fidelity ({error}): pip install 'varkern[measure]'"
        ) from error
    except RuntimeError as error:  # torch-fidelity imports torchvision, which raises this if it does not fit torch
        raise ImportError(
            f"torch-fidelity cannot be imported; install the torchvision that belongs to this torch: {error}"
        ) from error
    path = weights or download(URL_INCEPTION_V3)
    # torch-fidelity unpickles the file. If it loads with weights_only=True first, unpickling it runs no code.
    try:
        torch.load(path, map_location="cpu", weights_only=True)
        network = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], str(path))
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{path} must have the Inception weights: {error}") from error
    network = network.to(device).eval()
    spatial: list[Tensor] = []
    # mixed_6 is torchvision's Mixed_6d; its conv is the 1x1 branch, after the ReLU.
    network.Mixed_6d.branch1x1.register_forward_hook(lambda *call: spatial.append(call[-1]))

    def extract(images: Tensor) -> Extracted:
        spatial.clear()
        features, logits = network(images)
        maps = rearrange(spatial.pop()[:, :SPATIAL_CHANNELS], "n c h w -> n (h w c)")
        return Extracted(features, logits, maps)

    return Extractor("inception", extract, device)


def download(url: str) -> Path:
    """The path of the file at ``url`` in PyTorch's hub folder. It is downloaded if missing, and its hash is checked.

    Raises:
        OSError: if it cannot be downloaded.
    """
    name = url.rsplit("/", 1)[-1]
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, str(path), hash_prefix=Path(name).stem.rsplit("-", 1)[-1])
    except (OSError, RuntimeError) as error:
        raise OSError(
            f"the Inception weights could not be downloaded ({error}): download {url} and pass its path as "
            "--inception-weights"
        ) from error
    return path
