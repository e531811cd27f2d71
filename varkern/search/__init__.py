"""Rules for keeping one of several candidates; one file a rule."""

from .base import Candidates, Choice, Search
from .best_of_m import BestOfM
from .block_resample import BlockResample
from .combined import Combined, as_search
from .density import DensitySearch
from .diagnostics import Steps, effective_sample_size
from .path_rules import Cluster, Paths, Resample, Top
from .paths import LogRatio, PathSearch
from .published_scorer import PublishedScorer
from .scorers import SumOfScorers

__all__ = [
    "BestOfM",
    "BlockResample",
    "Candidates",
    "Choice",
    "Cluster",
    "Combined",
    "DensitySearch",
    "LogRatio",
    "PathSearch",
    "Paths",
    "PublishedScorer",
    "Resample",
    "Search",
    "Steps",
    "SumOfScorers",
    "Top",
    "as_search",
    "effective_sample_size",
]
