r"""What a policy can ask of exp_avg or exp_avg_sq: operations, and how they are written.

An operation may need what only the checkpoint knows (betas, step, the mean of other rows); planning
turns it into an element rule (`megatron_ext.rules`). Plain data, no torch.

Every operation is written the same way in a flag, in YAML and in a report: see `GRAMMAR`.
"""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass
from typing import Any, Literal, get_args

from .errors import PolicyError
from .rules import KEEP, Fill, Floor, Keep, PruneRandom, Scale

RowStatistic = Literal["mean", "median", "column-mean"]

#: How each operation is written, and what it does.
GRAMMAR = {
    "keep": "as it is in the checkpoint",
    "reset": "0; the old value is not looked at",
    "scale A": "x' = A x",
    "fill X": "x' = X",
    "fill mean": "the mean of the rows that are kept",
    "fill median": "their median (exp_avg_sq only: exp_avg has two signs)",
    "fill column-mean": "for each column the mean of the rows that are kept",
    "floor X": "x' = max(x, X)",
    "prune P": "0 unless abs(x) is above the P-quantile of the parameter (ReLoRA)",
    "prune-random P [seed N]": "0 with probability P, by the element's global index",
    "batch-size K": "exp_avg_sq for a batch K times as large (experimental)",
    "bias-consistent": "keeps the bias-corrected moment where betas or step change",
}


@dataclass(frozen=True)
class FillFrom:
    """Set to a statistic of the same moment in the rows of the parameter that are kept.

    Rows that are scaled count as kept, with their new values. Where one rule fills all rows of a
    parameter, the statistic is that of all its rows.

    Args:
        statistic: ``mean`` and ``median`` are one number a parameter; ``column-mean`` is one for
            each index into the dimensions after the first.
    """

    statistic: RowStatistic

    def __post_init__(self) -> None:
        if self.statistic not in get_args(RowStatistic):
            raise PolicyError(
                f"fill: expected a number or one of {', '.join(get_args(RowStatistic))}, found "
                f"{self.statistic!r}"
            )


@dataclass(frozen=True)
class Prune:
    """Set to zero what is not above the p-quantile of abs(x) over the rule's rows of a parameter.

    Args:
        fraction: p, from 0 to 1.

    References:
        ReLoRA, arXiv 2307.05695.
    """

    fraction: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.fraction <= 1.0:
            raise PolicyError(f"prune: expected a fraction from 0 to 1, found {self.fraction!r}")


@dataclass(frozen=True)
class BatchRatio:
    """The batch-size rule for exp_avg_sq (`megatron_ext.rules.BatchSize`); experimental.

    Args:
        ratio: k = new / old global batch size.
    """

    ratio: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.ratio) and self.ratio > 0.0):
            raise PolicyError(f"batch-size: expected a ratio above 0, found {self.ratio!r}")


@dataclass(frozen=True)
class BiasConsistent:
    r"""Keep the bias-corrected moment where betas or step change.

    .. math:: x' = x (1 - b'^{t'}) / (1 - b^t)

    Derived from Adam's definition, arXiv 1412.6980.
    """


Operation = (
    Keep | Scale | Fill | Floor | PruneRandom | FillFrom | Prune | BatchRatio | BiasConsistent
)

RESET = Fill(0.0)

_PLAIN: dict[str, Operation] = {
    "keep": KEEP,
    "reset": RESET,
    "bias-consistent": BiasConsistent(),
}
_NUMBER = {"scale": Scale, "floor": Floor, "prune": Prune, "batch-size": BatchRatio}
#: A number as it is written: finite, decimal.
DECIMAL = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?", re.ASCII)
_NAMES = (*_PLAIN, *_NUMBER, "fill", "prune-random")


def parse(text: str) -> Operation:
    """Read an operation.

    Args:
        text: As in `GRAMMAR`.

    Raises:
        PolicyError: It is none; the message suggests one or lists all.
    """
    name, _, rest = str(text).strip().partition(" ")
    words = rest.split()
    if name in _PLAIN and not words:
        return _PLAIN[name]
    if name in _NUMBER and len(words) == 1:
        operation: Operation = _NUMBER[name](_number(text, words[0]))
        return operation
    if name == "fill" and len(words) == 1:
        if words[0] in get_args(RowStatistic):
            return FillFrom(words[0])  # type: ignore[arg-type]
        return Fill(_number(text, words[0]))
    if name == "prune-random" and (len(words) == 1 or (len(words) == 3 and words[1] == "seed")):
        seed = _integer(text, words[2]) if len(words) == 3 else 0
        return PruneRandom(_number(text, words[0]), seed)
    forms = [f for f in GRAMMAR if f.split()[0] == name]
    if forms:
        raise PolicyError(f"{text!r}: expected {' or '.join(map(repr, forms))}")
    near = difflib.get_close_matches(name, _NAMES, 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise PolicyError(f"unknown operation {text!r}; {hint}Operations: {', '.join(GRAMMAR)}")


def write(operation: Operation) -> str:
    """The text that `parse` reads back as the same operation."""
    match operation:
        case Scale(factor):
            return f"scale {factor!r}"
        case Fill(value):
            return "reset" if operation == RESET else f"fill {value!r}"
        case Floor(minimum):
            return f"floor {minimum!r}"
        case PruneRandom(probability, seed):
            return f"prune-random {probability!r}" + (f" seed {seed}" if seed else "")
        case FillFrom(statistic):
            return f"fill {statistic}"
        case Prune(fraction):
            return f"prune {fraction!r}"
        case BatchRatio(ratio):
            return f"batch-size {ratio!r}"
        case BiasConsistent():
            return "bias-consistent"
    return "keep"


def check_moment(key: str, operation: Any, where: str) -> None:
    """Refuse what is no operation, or has no meaning for this moment.

    Args:
        key: ``exp_avg`` or ``exp_avg_sq``.
        operation: What is to be done to it.
        where: The rule, for the message.

    Raises:
        PolicyError: exp_avg_sq would become negative; exp_avg is given a rule of exp_avg_sq.
    """
    if not isinstance(operation, Operation):
        raise PolicyError(
            f"{where}: {key}: expected an operation of megatron_ext.operations, found {operation!r}"
        )
    text = write(operation)
    if isinstance(operation, Floor) and operation.factor != 1.0:
        raise PolicyError(f"{where}: {operation!r}: expected a floor without a factor")
    if key == "exp_avg":
        if isinstance(operation, BatchRatio):
            raise PolicyError(f"{where}: {text!r} is a rule for exp_avg_sq, not for exp_avg")
        if operation == FillFrom("median"):
            raise PolicyError(
                f"{where}: {text!r} is for exp_avg_sq; exp_avg has two signs: use 'fill mean' or "
                "'reset'"
            )
        if isinstance(operation, Floor):
            raise PolicyError(
                f"{where}: {text!r} is for exp_avg_sq, whose root is divided by, not for exp_avg"
            )
        return
    values = {Scale: "factor", Fill: "value", Floor: "minimum"}
    if type(operation) in values and getattr(operation, values[type(operation)]) < 0.0:
        raise PolicyError(
            f"{where}: {text!r} would make exp_avg_sq negative, and Adam takes its square root; "
            "expected a number of at least 0"
        )


def _number(text: str, word: str) -> float:
    if not DECIMAL.fullmatch(word):
        raise PolicyError(f"{text!r}: expected a number, found {word!r}")
    return float(word)


def _integer(text: str, word: str) -> int:
    if not re.fullmatch(r"-?\d+", word, re.ASCII):
        raise PolicyError(f"{text!r}: expected an integer, found {word!r}")
    return int(word)
