"""Rules for keeping one of several candidates; one file a rule."""

from .base import Candidates, Choice, Search
from .best_of_m import BestOfM
from .block_resample import BlockResample
from .combined import Combined, as_search
from .density import DensitySearch
from .diagnostics import Steps, effective_sample_size
from .published_scorer import PublishedScorer
from .scorers import MeanOfScorers, SumOfScorers

__all__ = [
    "BestOfM",
    "BlockResample",
    "Candidates",
    "Choice",
    "Combined",
    "DensitySearch",
    "MeanOfScorers",
    "PublishedScorer",
    "Search",
    "Steps",
    "SumOfScorers",
    "as_search",
    "effective_sample_size",
]
