r"""Presets: the named moment rules of the literature, with their hyperparameter changes.

A preset changes every moment element that no rule covers, ``step``, and the hyperparameters that
follow. Hyperparameters are computed from the current arguments, never from the checkpoint, so that
a restart with the same command line computes the same values.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import PolicyError
from ..rules.base import ElementRule, Rule
from ..rules.batch_size import BatchRatio
from ..rules.bias_consistent import BiasConsistent
from ..rules.elementwise import KEEP, RESET, Scale
from ..rules.form import DECIMAL, MOMENTS
from ..rules.prune import Prune

Step = int | Literal["keep", "reset"]


@dataclass(frozen=True)
class Change:
    """The change that a preset makes to one hyperparameter.

    Args:
        key: A param_group key, or ``clip_grad`` of the optimizer's config.
        decline: The name under which it can be declined.
        factor: The factor f.
        complement: False for x' = f x; True for 1 - x' = f (1 - x), for each number of a pair.
    """

    key: str
    decline: str
    factor: float
    complement: bool = False

    def apply(self, value: Any) -> Any:
        """Compute the new value of `key`.

        Raises:
            PolicyError: A beta would leave [0, 1).
        """
        if not self.complement:
            return value * self.factor
        out = tuple(1.0 - self.factor * (1.0 - b) for b in value)
        for old, new in zip(value, out, strict=True):
            # 10 x (1 - 0.9) is 1 except for rounding.
            if not 1e-9 < new < 1.0:
                raise PolicyError(
                    f"preset for the batch size: with k = {self.factor:g} a beta of {old:g} would "
                    f"become {new:g}; expected k (1 - beta) < 1. Decline betas, or take a smaller "
                    "ratio"
                )
        return out

    def formula(self, value: Any) -> str:
        """Write the formula of the new value, for the report."""
        if self.complement:
            return f"1 - {self.factor:g} (1 - beta)"
        return f"{value:g} x {self.factor:g}"


@dataclass(frozen=True)
class Effect:
    """The changes that a preset makes.

    Args:
        exp_avg: Rule for every element of exp_avg that no other rule covers.
        exp_avg_sq: Rule for every element of exp_avg_sq that no other rule covers.
        step: Change of ``step``.
        changes: Changes of hyperparameters.
    """

    exp_avg: Rule = KEEP
    exp_avg_sq: Rule = KEEP
    step: Step = "keep"
    changes: tuple[Change, ...] = ()


@dataclass(frozen=True)
class Preset:
    """A preset by name.

    Args:
        name: One of `CATALOGUE`.
        arguments: Its numbers, in the order of `CATALOGUE`.
        decline: Parts of it that are left out (`declinable`).
        moments: Whether moments and ``step`` are changed. False in a continued phase, where they
            have been changed already: only hyperparameters follow.

    Raises:
        PolicyError: The preset is unknown or has the wrong numbers, or fp32 cannot hold those of
            its rules.
    """

    name: str = "keep"
    arguments: tuple[float, ...] = ()
    decline: tuple[str, ...] = ()
    moments: bool = True

    def __post_init__(self) -> None:
        """Check the name, the numbers and the declined parts."""
        if not isinstance(self.name, str) or self.name not in CATALOGUE:
            near = difflib.get_close_matches(str(self.name), CATALOGUE, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise PolicyError(f"unknown preset {self.name!r}; {hint}Presets: {', '.join(forms())}")
        entry = CATALOGUE[self.name]
        try:
            numbers = tuple(map(_float, self.arguments))
        except (TypeError, ValueError):
            numbers = (math.nan,)
        if len(numbers) != len(entry.arguments) or not all(map(math.isfinite, numbers)):
            raise PolicyError(
                f"preset {self.name}: expected {_form(self.name)!r}, found "
                f"{' '.join(map(str, (self.name, *self.arguments)))!r}"
            )
        if any(a <= 0.0 for a in numbers) and "exclusiveMinimum" in dict(entry.bounds):
            raise PolicyError(
                f"preset {self.name}: expected numbers above 0, found {list(self.arguments)}"
            )
        object.__setattr__(self, "arguments", numbers)
        object.__setattr__(self, "decline", tuple(dict.fromkeys(self.decline)))
        unknown = [d for d in self.decline if d not in self.declinable]
        if unknown:
            can = ", ".join(self.declinable) or "nothing"
            raise PolicyError(
                f"preset {self.name}: {', '.join(map(repr, unknown))} cannot be declined; it "
                f"changes {can}"
            )
        effect = entry.effect(*numbers)  # its rules check their numbers
        for key in MOMENTS:
            rule = getattr(effect, key)
            if isinstance(rule, ElementRule) and rule.overflow:
                raise PolicyError(f"preset {self}: {key}: {rule.overflow}")

    @property
    def declinable(self) -> tuple[str, ...]:
        """The names of the parts that can be declined."""
        return CATALOGUE[self.name].declinable

    @property
    def effect(self) -> Effect:
        """The changes that the preset makes, without the declined ones."""
        full = CATALOGUE[self.name].effect(*self.arguments)
        changes = tuple(c for c in full.changes if c.decline not in self.decline)
        if not self.moments:
            return Effect(changes=changes)
        return Effect(
            exp_avg=full.exp_avg,
            exp_avg_sq=KEEP if "exp_avg_sq" in self.decline else full.exp_avg_sq,
            step=full.step,
            changes=changes,
        )

    @property
    def declined(self) -> tuple[Change, ...]:
        """The hyperparameter changes that are declined."""
        changes = CATALOGUE[self.name].effect(*self.arguments).changes
        return tuple(c for c in changes if c.decline in self.decline)

    def __str__(self) -> str:
        """Write the preset as in a flag."""
        numbers = (f"{a:g}" if float(f"{a:g}") == a else repr(a) for a in self.arguments)
        return " ".join([self.name, *numbers])


@dataclass(frozen=True)
class _Entry:
    """One preset; `bounds` of its numbers are in the words of JSON schema."""

    arguments: tuple[str, ...]
    effect: Callable[..., Effect]
    what: str
    source: str
    declinable: tuple[str, ...] = ()
    bounds: tuple[tuple[str, int], ...] = (("exclusiveMinimum", 0),)


def _float(found: Any) -> float:
    if isinstance(found, bool) or (isinstance(found, str) and not DECIMAL.fullmatch(found)):
        return math.nan
    return float(found)


def _gradient_scale(s: float) -> Effect:
    changes = (Change("eps", "eps", s), Change("clip_grad", "clip_grad", s))
    return Effect(Scale(s), Scale(s * s), changes=changes)


def _batch_sqrt(old: float, new: float) -> Effect:
    k = new / old
    return Effect(
        changes=(
            Change("max_lr", "lr", math.sqrt(k)),
            Change("min_lr", "lr", math.sqrt(k)),
            Change("betas", "betas", k, complement=True),
            Change("eps", "eps", 1.0 / math.sqrt(k)),
        )
    )


def _batch_size(old: float, new: float) -> Effect:
    return dataclasses.replace(_batch_sqrt(old, new), exp_avg_sq=BatchRatio(new / old))


#: Presets for another global batch size; their arguments are the old one and the new one.
OF_BATCH_SIZE = ("batch-sqrt", "batch-size")


#: Name -> the preset's arguments, effect, description and source.
CATALOGUE = {
    "keep": _Entry((), Effect, "moments and step as in the checkpoint", "the default"),
    "reset": _Entry(
        (),
        lambda: Effect(RESET, RESET, "reset"),
        "exp_avg = exp_avg_sq = 0, step = 0; needs a re-warm-up of about 1 / (1 - b2) steps",
        "arXiv 2306.17833, 2501.06842",
    ),
    "reset-momentum": _Entry(
        (), lambda: Effect(RESET), "exp_avg = 0; exp_avg_sq and step kept", "common practice"
    ),
    "bias-consistent": _Entry(
        (),
        lambda: Effect(BiasConsistent(), BiasConsistent()),
        "keeps the bias-corrected moments where betas or step change",
        "derived from arXiv 1412.6980",
    ),
    "gradient-scale": _Entry(
        ("S",),
        _gradient_scale,
        "the gradient is S times what it was: exp_avg x S, exp_avg_sq x S^2, eps and clip_grad x S",
        "Adam's scale invariance, arXiv 1412.6980",
        ("eps", "clip_grad"),
    ),
    "batch-sqrt": _Entry(
        ("OLD", "NEW"),
        _batch_sqrt,
        "the square-root scaling rule, k = NEW / OLD: lr x sqrt(k), 1 - b' = k (1 - b), "
        "eps / sqrt(k); moments kept",
        "arXiv 2205.10287",
        ("lr", "betas", "eps"),
    ),
    "batch-size": _Entry(
        ("OLD", "NEW"),
        _batch_size,
        "batch-sqrt, and exp_avg_sq by the batch-size rule, which is experimental",
        "hyperparameters arXiv 2205.10287; exp_avg_sq experimental",
        ("lr", "betas", "eps", "exp_avg_sq"),
    ),
    "relora": _Entry(
        ("P",),
        lambda p: Effect(Prune(p), Prune(p)),
        "of each parameter, exp_avg and exp_avg_sq keep what is above the P-quantile of abs(x)",
        "arXiv 2307.05695",
        bounds=(("minimum", 0), ("maximum", 1)),
    ),
}


#: The default preset, which changes nothing.
KEEP_ALL = Preset()


def forms() -> list[str]:
    """List the form of each preset, as it is written in a flag."""
    return [_form(name) for name in CATALOGUE]


def _form(name: str) -> str:
    return " ".join([name, *CATALOGUE[name].arguments])
