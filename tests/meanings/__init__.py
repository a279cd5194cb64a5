"""Models that convert and fold must not change: what test_convert_meaning.py converts and folds, by what they do."""

from meanings import gradients, in_place, objects, state, statistics, unseen  # noqa: F401  (they add to CASES)
from meanings.base import CASES, PATCHED, Layers, X
from meanings.state import TakesATensorOrAList

__all__ = ["CASES", "PATCHED", "Layers", "TakesATensorOrAList", "X"]
