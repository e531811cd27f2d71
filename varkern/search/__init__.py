"""Rules for keeping one of several candidates; one file a rule."""

from .base import Candidates, Choice, Search
from .best_of_m import BestOfM
from .combined import Combined, as_search
from .density import DensitySearch

__all__ = ["BestOfM", "Candidates", "Choice", "Combined", "DensitySearch", "Search", "as_search"]
