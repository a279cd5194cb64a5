"""Learning rates of `cnnkern train`: where they start, and how they fall."""

from __future__ import annotations

import math
from collections.abc import Callable

# Factor of the learning rate by the share of the run that is done.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "step": lambda done: 0.1 ** int(3 * done),
}
LEARNING_RATES = {"adam": 1e-3, "adamw": 1e-3, "sgd": 0.05}
