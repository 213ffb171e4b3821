"""The registry of moment rules, which all code that reads, writes or applies rules uses.

A rule is registered when its module is imported, and `megatron_ext.rules` imports all modules. The
registration refuses an incomplete rule and names what is missing. No other code lists the rules,
and no code treats an unknown rule as one that keeps the moments.
"""

from __future__ import annotations

import difflib
from typing import Any, TypeVar, get_args

from ..errors import PolicyError
from .base import ElementRule, Kind, Rule, Statistic
from .form import MOMENTS, Form, Key

#: Largest number of coefficients of a rule (kCoefficients in ``csrc/element_rule.h``).
COEFFICIENTS = 6

_registered: list[type[Rule]] = []
_R = TypeVar("_R", bound=type[Rule])


def register(rule: _R) -> _R:
    """Register a rule. A class decorator, above ``@dataclass(frozen=True)``.

    Raises:
        TypeError: The rule is incomplete, or conflicts with another rule. The message lists the
            defects.
    """
    defects = [
        *_defects(rule),
        *(_element_defects(rule) if issubclass(rule, ElementRule) else _operation_defects(rule)),
    ]
    if defects:
        raise TypeError(f"moment rule {rule.__name__}: {'; '.join(defects)}")
    _registered.append(rule)
    return rule


def rules() -> tuple[type[Rule], ...]:
    """List all registered rules."""
    return tuple(_registered)


def element_rules() -> dict[int, type[ElementRule]]:
    """Map each code to its element rule, in the order of the codes."""
    found = [r for r in _registered if issubclass(r, ElementRule)]
    return {r.code: r for r in sorted(found, key=lambda r: r.code)}


def manifest() -> str:
    """Write the element rules as the compiled libraries list them, one per line.

    A line has name, code, number of coefficients, kind, and whether the old value is read
    (the list in ``csrc/element_rule.h``).
    """
    return "".join(
        f"\n{r.name} {r.code} {len(r.coefficient_names)} {r.kind} {str(r.reads_old).lower()}"
        for r in element_rules().values()
    )


def forms() -> dict[str, tuple[type[Rule], Form]]:
    """Map the text of each form to its rule and the form."""
    return {form.text: (rule, form) for rule in _registered for form in rule.forms}


def grammar() -> dict[str, str]:
    """Map the text of each form to its description."""
    return {text: form.what for text, (_, form) in forms().items()}


def pattern() -> str:
    """Build a regular expression of the text that `parse` accepts, for a JSON schema."""
    return f"^ *({'|'.join(form.pattern for _, form in forms().values())}) *$"


def parse(text: str) -> Rule:
    """Read a rule.

    Args:
        text: A text of a form in `grammar`.

    Raises:
        PolicyError: The text is not a rule. The message suggests one or lists all.
    """
    name, _, rest = str(text).strip().partition(" ")
    words = (name, *rest.split())
    # A form without a number takes precedence over one with a number in the same place.
    fitting = [(r, f) for r, f in forms().values() if f.matches(words)]
    fitting.sort(key=lambda found: len(found[1].placeholders))
    unfinished = [form.text for _, form in forms().values() if form.lacks(words)]
    for rule, form in fitting if not unfinished else ():
        return rule(*form.read(words, text))
    same_name = unfinished or [text for text, (_, form) in forms().items() if form.name == name]
    if same_name:
        raise PolicyError(f"{text!r}: expected {' or '.join(map(repr, same_name))}")
    names = dict.fromkeys(form.name for _, form in forms().values())
    near = difflib.get_close_matches(name, names, 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise PolicyError(f"unknown operation {text!r}; {hint}Operations: {', '.join(grammar())}")


def write(rule: Rule) -> str:
    """Write a rule so that `parse` reads the same rule.

    Raises:
        TypeError: The rule is not registered.
        PolicyError: The rule has no form.
    """
    known(rule)
    return rule.form.write(rule)


def check_moment(key: Key, rule: Any, where: str) -> None:
    """Refuse an object that is not a policy's rule, or a rule that is not for this moment.

    Args:
        key: ``exp_avg`` or ``exp_avg_sq``.
        rule: The rule for this moment.
        where: The rule of the policy, for the message.

    Raises:
        PolicyError: The object has no form, the rule is for the other moment, it would make
            exp_avg_sq negative, or fp32 cannot hold its numbers.
    """
    if type(rule) not in _registered or not rule.forms:
        raise PolicyError(
            f"{where}: {key}: expected an operation of megatron_ext.rules, found {rule!r}"
        )
    if rule.refusal:
        raise PolicyError(f"{where}: {rule.refusal}")
    text, form = write(rule), rule.form
    if key not in form.moments:
        because = form.because or f"is a rule for {' and '.join(form.moments)}, not for {key}"
        raise PolicyError(f"{where}: {text!r} {because}")
    if key == "exp_avg_sq" and rule.makes_negative:
        raise PolicyError(
            f"{where}: {text!r} would make exp_avg_sq negative, and Adam takes its square root; "
            "expected a number of at least 0"
        )
    if isinstance(rule, ElementRule) and rule.overflow:
        raise PolicyError(f"{where}: {text!r}: {rule.overflow}")


def check_pair(exp_avg: ElementRule, exp_avg_sq: ElementRule) -> None:
    """Refuse element rules that cannot be combined for the same elements.

    Raises:
        TypeError: One of them is not a registered element rule.
        PolicyError: A joint rule is for exp_avg, or exp_avg is not kept beside it.
    """
    for rule in (exp_avg, exp_avg_sq):
        if not isinstance(known(rule), ElementRule):
            raise TypeError(f"{rule!r} is no element rule: it has to be resolved first")
    if exp_avg.kind == "joint":
        raise PolicyError(f"{type(exp_avg).__name__} is a rule for exp_avg_sq, not for exp_avg")
    if exp_avg_sq.kind == "joint" and exp_avg.kind != "kept":
        raise PolicyError(
            f"{type(exp_avg_sq).__name__} for exp_avg_sq reads exp_avg, which must be kept, not "
            f"{exp_avg}"
        )


def of_statistic(statistic: Statistic, value: float) -> ElementRule:
    """Make the element rule from a statistic and its value.

    Raises:
        TypeError: No registered rule uses statistics of this kind.
    """
    for rule in _registered:
        if statistic.kind in rule.statistics:
            return rule.of_statistic(value)
    raise TypeError(f"no moment rule is registered for a statistic of kind {statistic.kind!r}")


def known(rule: Any) -> Rule:
    """Return a rule if its class is registered.

    Raises:
        TypeError: Its class is not registered.
    """
    if type(rule) not in _registered:
        raise TypeError(
            f"{rule!r} is no registered moment rule; put @register above its class "
            "(megatron_ext.rules.registry)"
        )
    found: Rule = rule
    return found


def _defects(rule: type[Rule]) -> list[str]:
    out = [f"{n} is not set" for n in ("forms", "keeps_bias", "reads_old") if not hasattr(rule, n)]
    taken = forms()
    for form in getattr(rule, "forms", ()):
        if form.text in taken:
            out.append(f"{form.text!r} is a form of {taken[form.text][0].__name__} already")
        out += [
            f"form {form.text!r} has no {n}"
            for n in ("what", "formula", "basis", "moments")
            if not getattr(form, n)
        ]
        out += [f"form {form.text!r} gives no value to {n}" for n in form.unset(rule)]
        out += [f"form {form.text!r}: no moment {k!r}" for k in form.moments if k not in MOMENTS]
    if rule.statistics and rule.of_statistic is Rule.of_statistic:
        out.append("of_statistic is not defined, and it has statistics")
    return out


def _operation_defects(rule: type[Rule]) -> list[str]:
    """List the defects of a rule that has to resolve to an element rule."""
    out = [] if getattr(rule, "forms", ()) else ["it has no form, and it is no element rule"]
    return out + (["resolve is not defined"] if rule.resolve is Rule.resolve else [])


def _element_defects(rule: type[ElementRule]) -> list[str]:
    needed = ("name", "code", "kind", "coefficient_names")
    out = [f"{name} is not set" for name in needed if not hasattr(rule, name)]
    for name in ("coefficients", "reference"):
        if getattr(rule, name) is getattr(ElementRule, name):
            out.append(f"{name} is not defined")
    if out:
        return out
    if rule.kind not in get_args(Kind):
        out.append(f"kind is {rule.kind!r}; expected one of {', '.join(get_args(Kind))}")
    if len(rule.coefficient_names) > COEFFICIENTS:
        out.append(f"{len(rule.coefficient_names)} coefficients; at most {COEFFICIENTS} fit")
    for other in element_rules().values():
        out += [
            f"{name} {getattr(rule, name)!r} is that of {other.__name__} already"
            for name in ("name", "code")
            if getattr(rule, name) == getattr(other, name)
        ]
    return out
