"""Models that convert and fold must not change: what test_convert_meaning.py converts and folds, by what they do."""

from meanings import (  # noqa: F401  (they add to CASES)
    composites,
    gradients,
    graphs,
    habits,
    in_place,
    libraries,
    nodes,
    objects,
    onto,
    prelu,
    settings,
    state,
    statistics,
    unseen,
)
from meanings.base import CASES, PATCHED, Layers, X
from meanings.prelu import IResNetBlock, Sloped
from meanings.state import TakesATensorOrAList

__all__ = ["CASES", "PATCHED", "IResNetBlock", "Layers", "Sloped", "TakesATensorOrAList", "X"]
