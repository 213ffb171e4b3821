"""Moment rules: what can be done to exp_avg and exp_avg_sq, one module a rule.

A policy names a `Rule` (`parse`, `write`); planning resolves it with what the checkpoint knows into
an `ElementRule`, which the fused op applies. Everything else that knows rules asks the registry.
"""

from __future__ import annotations

import importlib
import pkgutil

from .elementwise import KEEP, RESET, Fill, Floor, Keep, Scale

# isort: split
# The rules above are the first in every list; these follow.
from . import registry
from .base import ElementRule, Rule, Statistic
from .batch_size import BatchRatio, BatchSize
from .bias_consistent import BiasConsistent
from .fill_from import FillFrom
from .form import DECIMAL, Form, Key
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

# Every module of the package is imported, so that a rule's own file is all it takes to add one.
for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

#: How each rule is written, and what it does.
GRAMMAR = registry.grammar()
