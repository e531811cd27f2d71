"""Best-of-M sampling for visual autoregressive (VAR) image models at next to no cost."""

# ruff: noqa: E402
from varkern.installation import check_kernels

check_kernels(__path__[0])  # comes first, because later imports may import a kernel

from varkern import models as models
from varkern import ops as ops
from varkern import search as search
from varkern.checks import check
from varkern.errors import OwnLoopError, UnsupportedModelError
from varkern.generation import Generation, generate
from varkern.models import load_vae, load_var
from varkern.ops import image_seeds, use_backend
from varkern.own_loop import searching
from varkern.patching import explain_patch, patch, patched, unpatch
from varkern.path_loop import PathTree
from varkern.scorer import Scorer, ScorerConfig
from varkern.search import (
    BestOfM,
    BlockResample,
    Combined,
    DensitySearch,
    LogRatio,
    PathSearch,
    PublishedScorer,
    SumOfScorers,
)

__version__ = "0.1.0"

__all__ = [
    "BestOfM",
    "BlockResample",
    "Combined",
    "DensitySearch",
    "Generation",
    "LogRatio",
    "OwnLoopError",
    "PathSearch",
    "PathTree",
    "PublishedScorer",
    "Scorer",
    "ScorerConfig",
    "SumOfScorers",
    "UnsupportedModelError",
    "check",
    "explain_patch",
    "generate",
    "image_seeds",
    "load_vae",
    "load_var",
    "patch",
    "patched",
    "searching",
    "unpatch",
    "use_backend",
]
