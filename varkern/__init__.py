"""Best-of-M sampling for visual autoregressive (VAR) image models at next to no cost."""

from varkern.checks import check
from varkern.errors import UnsupportedModelError
from varkern.generation import Generation, generate
from varkern.models import load_vae, load_var
from varkern.ops import image_seeds, use_backend
from varkern.patching import patch, patched, unpatch
from varkern.scorer import Scorer, ScorerConfig
from varkern.search import BestOfM, Combined, DensitySearch, PublishedScorer

__version__ = "0.1.0"

__all__ = [
    "BestOfM",
    "Combined",
    "DensitySearch",
    "Generation",
    "PublishedScorer",
    "Scorer",
    "ScorerConfig",
    "UnsupportedModelError",
    "check",
    "generate",
    "image_seeds",
    "load_vae",
    "load_var",
    "patch",
    "patched",
    "unpatch",
    "use_backend",
]
