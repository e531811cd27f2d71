"""Rules for keeping one of several candidates; one file a rule."""

from .base import Candidates, Choice, Search
from .best_of_m import BestOfM

__all__ = ["BestOfM", "Candidates", "Choice", "Search"]
