"""Moment rules for exp_avg and exp_avg_sq, with one module per rule.

A policy names a `Rule` (`parse`, `write`). Planning resolves it, with values from the checkpoint,
to an `ElementRule`, which the fused op applies. All other code finds rules in the registry.
"""

from __future__ import annotations

import importlib
import pkgutil

from .elementwise import KEEP, RESET, Fill, Floor, Keep, Scale

# isort: split
# The rules imported above come first in every list, and those below follow.
from . import registry
from .base import ElementRule, Rule, Statistic
from .batch_size import BatchRatio, BatchSize
from .bias_consistent import BiasConsistent
from .fill_from import FillFrom
from .form import DECIMAL, Form, Key
from .mean_of import MeanOf
from .prune import Prune, PruneMagnitude, PruneRandom
from .registry import check_moment, parse, write

__all__ = [
    "DECIMAL",
    "GRAMMAR",
    "KEEP",
    "RESET",
    "BatchRatio",
    "BatchSize",
    "BiasConsistent",
    "ElementRule",
    "Fill",
    "FillFrom",
    "Floor",
    "Form",
    "Keep",
    "Key",
    "MeanOf",
    "Prune",
    "PruneMagnitude",
    "PruneRandom",
    "Rule",
    "Scale",
    "Statistic",
    "check_moment",
    "parse",
    "registry",
    "write",
]

# Every module of the package is imported, so that adding a rule's file is enough to register it.
for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

#: The text of each form of a rule -> its description.
GRAMMAR = registry.grammar()
