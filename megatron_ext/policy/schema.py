"""A policy as plain data: the types of a policy file, from which its JSON schema is made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypedDict

from ..base.schema import INLINE, Count, Keywords
from ..checkpoint.state import LARGEST_STEP
from ..rules import registry
from .checks import NOT_A_CHOICE
from .match import Scalar
from .parameter_map import Copied
from .preset_schema import presets

Origin = Literal["args", "checkpoint"]
KeepOrReset = Literal["keep", "reset"]
Position = Literal["continue", "restart"]
Nonfinite = Literal["error", "reset", "keep"]
Masters = Literal["checkpoint", "model"]

#: A regular expression of a phase's name.
PHASE_NAME = "[A-Za-z0-9_.-]*"

_Key = Annotated[str, Keywords(pattern=r"^\w+$", **{"not": {"enum": list(NOT_A_CHOICE)}})]
Keys = Annotated[
    list[_Key], Keywords("keys", description="Keys of a param_group.", uniqueItems=True)
]
Attributes = Annotated[
    Mapping[str, Scalar],
    Keywords("attributes", description="Keys of a param_group and the values they have."),
]
Operation = Annotated[
    str,
    Keywords("operation", description="An operation on one moment.", pattern=registry.pattern()),
]


class _GroupMatch(TypedDict):
    """Which param_groups.

    Attributes:
        match: Values that the param_group has, by key.
    """

    match: Annotated[Attributes, Keywords(minProperties=1)]


class GroupRuleDocument(_GroupMatch, total=False):
    """An exception for some param_groups.

    Attributes:
        keep: Keys that come from the checkpoint in these groups.
        take: Keys that come from the arguments in these groups.
    """

    keep: Keys
    take: Keys


_GroupRule = Annotated[
    GroupRuleDocument, INLINE, Keywords(anyOf=[{"required": ["keep"]}, {"required": ["take"]}])
]


class HyperparametersDocument(TypedDict, total=False):
    """Where the keys of the param_groups come from.

    Attributes:
        source: Of the keys that are not named. Default: args.
        keep: Keys that come from the checkpoint.
        take: Keys that come from the arguments.
        groups: Exceptions for some param_groups.
    """

    source: Origin
    keep: Keys
    take: Keys
    groups: list[_GroupRule]


class CountersDocument(TypedDict, total=False):
    """The counters of the run, each by itself.

    Attributes:
        iteration: reset: the iteration counts from 0 again (--reset-iteration). Default: keep.
        dataloader: reset: the data is read from its beginning again (--reset-dataloader). Default:
            keep.
        schedule: The scheduler's position. Default: restart with the iteration, else continue.
        grad_scaler: reset: fp16's loss scale is the arguments' initial one. Default: keep.
    """

    iteration: KeepOrReset
    dataloader: KeepOrReset
    schedule: Position
    grad_scaler: KeepOrReset


class MatchDocument(TypedDict, total=False):
    """The same in parts.

    Attributes:
        name: Glob, or re: and a regular expression. A layer is decoder.layers.<global index>.
        rows: Rows along dimension 0 of the unsharded parameter, as A:B.
        ndim: Number of dimensions.
        group: Values that the parameter's param_group has, by key.
    """

    name: Annotated[str, Keywords(minLength=1)]
    rows: Annotated[str, Keywords(pattern=r"^\d*:\d*$")]
    ndim: Count
    group: Attributes


_TEXT_OF_MATCH = "NAME[A:B] ndim=N KEY=VALUE ...; NAME is a glob, or re: and a regular expression."
_Match = Annotated[
    Annotated[str, Keywords(description=_TEXT_OF_MATCH, minLength=1)]
    | Annotated[MatchDocument, INLINE],
    Keywords("match", description="Which parameters, and which of their rows."),
]


class _RuleMatch(TypedDict):
    """Which parameters.

    Attributes:
        match: Which parameters, and which of their rows.
    """

    match: _Match


class MomentRuleDocument(_RuleMatch, total=False):
    """What is done to the moments of some parameters.

    Attributes:
        exp_avg: What is done to exp_avg. Default: keep.
        exp_avg_sq: What is done to exp_avg_sq. Default: keep.
    """

    exp_avg: Operation
    exp_avg_sq: Operation


_CopyNames = TypedDict(
    "_CopyNames",
    {"to": Annotated[str, Keywords(minLength=1)], "from": Annotated[str, Keywords(minLength=1)]},
)
_CopyNames.__doc__ = """Which parameters, and where their state comes from.

Attributes:
    to: The current parameters: * is any text, {n} a number; or re: and a regular expression.
    from: The checkpoint's parameter: * is the text of the same * of `to`, {n-2} arithmetic on its
        numbers.
"""


class CopyDocument(_CopyNames, total=False):
    """Parameters that take their state from others.

    Attributes:
        state: What is copied. Default: all.
    """

    state: Copied


class ParametersDocument(TypedDict, total=False):
    """What is said about parameters that differ between the checkpoint and the model.

    Attributes:
        new: Patterns of the model's parameters whose state the checkpoint may lack.
        drop: Patterns of the checkpoint's parameters whose state may be left behind.
        copies: Parameters that take their state from other parameters of the checkpoint.
    """

    new: list[Annotated[str, Keywords(minLength=1)]]
    drop: list[Annotated[str, Keywords(minLength=1)]]
    copies: list[Annotated[CopyDocument, INLINE]]


class PolicyDocument(TypedDict, total=False):
    """What a resume does to hyperparameters, moments and step (--selective-policy FILE).

    What is left out has its default.

    Attributes:
        hyperparameters: Where the keys of the param_groups come from.
        schedule: checkpoint: as --use-checkpoint-opt_param-scheduler. Default: args.
        preset: What is done to every element of the moments that no rule names, and to step.
            Default: keep.
        moments: Rules; two must not meet in one element.
        step: Adam's step. Default: what the preset says.
        nonfinite: What to do about moments that Adam cannot use, in the checkpoint or after the
            rules: NaN, infinite, or negative in exp_avg_sq. Default: error.
        master_weights: The source of the fp32 master weights. model: they are made from the
            model's weights, once, and the moments are kept. Default: checkpoint.
        parameters: What is said about parameters that differ between the checkpoint and the
            model. It applies once, when the phase begins.
        strict: Whether a rule that matches nothing is an error. Default: true.
        counters: The counters of the run, each by itself. What is reset is reset once: a restart
            from the phase's own checkpoint goes on.
        phase: Name of the phase, to tell it from another one with the same policy.
    """

    hyperparameters: Annotated[HyperparametersDocument, INLINE]
    schedule: Origin
    preset: Annotated[str | dict[str, Any], Keywords(of=Any, oneOf=presets())]
    moments: list[Annotated[MomentRuleDocument, INLINE]]
    step: KeepOrReset | Annotated[int, Keywords(minimum=0, maximum=LARGEST_STEP)]
    nonfinite: Nonfinite
    master_weights: Masters
    parameters: Annotated[ParametersDocument, INLINE]
    strict: bool
    counters: Annotated[CountersDocument, INLINE]
    phase: Annotated[str, Keywords(pattern=f"^{PHASE_NAME}$")]
