"""Hypothesis strategies for policies and their parts."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hypothesis import strategies as st

from megatron_ext.errors import PolicyError
from megatron_ext.policy.match import GroupRule, Match, MomentRule
from megatron_ext.policy.parameter_map import Copy, ParameterMap
from megatron_ext.policy.policy import ResumePolicy
from megatron_ext.policy.presets import Preset
from megatron_ext.rules import registry
from megatron_ext.rules.base import Rule
from megatron_ext.rules.form import Key
from megatron_ext.rules.registry import check_moment

from .groups import KEEPABLE

_NUMBERS = st.one_of(
    st.floats(0.0, 1.0), st.floats(0.0, allow_infinity=False), st.floats(allow_nan=False)
).filter(math.isfinite)
_ABOVE_0 = st.floats(1e-6, 1e6)
_FRACTIONS = st.floats(0.0, 1.0)

_NAMES = st.sampled_from(
    (
        "*",
        "decoder.layers.1.*",
        "*[0-9].bias",
        "*[0:3]",
        "two words",
        "re:.*[.]weight",
        "re:(a|b) c",
        "re:[:]",
        "a b=c",
        " ",
        "ndim=2",
    )
)


def rules_of(form: str, key: Key) -> st.SearchStrategy[Rule]:
    """The rules of one form that have a meaning for a moment."""
    rule, found = registry.forms()[form]
    kinds = {"N": st.integers(), "PATTERN": _NAMES}
    placeholders = [kinds.get(word, _NUMBERS) for word in found.placeholders]

    def make(values: tuple[float | str, ...]) -> Rule | None:
        try:
            made = rule(*found.values, *values)
            check_moment(key, made, "")
        except PolicyError:
            return None
        return made

    return st.tuples(*placeholders).map(make).filter(lambda made: made is not None)


def _of_moment(key: Key) -> st.SearchStrategy[Rule]:
    forms = [text for text, (_, form) in registry.forms().items() if key in form.moments]
    return st.one_of([rules_of(text, key) for text in forms])


FOR_EXP_AVG = _of_moment("exp_avg")
FOR_EXP_AVG_SQ = _of_moment("exp_avg_sq")
OPERATIONS = FOR_EXP_AVG | FOR_EXP_AVG_SQ

_PLAIN = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.sampled_from(("muon", "1e-3", "true", "a b", "")),
)
_ATTRIBUTES = st.dictionaries(
    st.sampled_from(("is_expert_parallel", "wd_mult", "lr_mult", "ndim", "a b", "a=b")), _PLAIN
)
_ENDS = st.none() | st.integers(0, 100)
_ROWS = st.none() | st.tuples(_ENDS, _ENDS).filter(lambda r: r[1] is None or (r[0] or 0) < r[1])
MATCHES = st.builds(
    lambda name, rows, ndim, group: Match(name, rows, ndim, tuple(group.items())),
    _NAMES,
    _ROWS,
    st.none() | st.integers(0, 4),
    _ATTRIBUTES,
)


def _key_pairs(
    keys: Sequence[str],
) -> st.SearchStrategy[tuple[tuple[str, ...], tuple[str, ...]]]:
    return st.lists(st.sampled_from(keys), unique=True, max_size=4).flatmap(
        lambda some: st.integers(0, len(some)).map(lambda n: (tuple(some[:n]), tuple(some[n:])))
    )


_KEY_PAIRS = _key_pairs(KEEPABLE)
GROUP_RULES = st.builds(
    lambda match, keys: GroupRule(tuple(match.items()), *keys),
    _ATTRIBUTES.filter(bool),
    _key_pairs([k for k in KEEPABLE if k != "weight_decay"]).filter(any),
)
PRESETS = st.one_of(
    st.sampled_from([Preset(n) for n in ("keep", "reset", "reset-momentum", "bias-consistent")]),
    st.builds(
        lambda s, decline: Preset("gradient-scale", (s,), tuple(decline)),
        _ABOVE_0,
        st.lists(st.sampled_from(("eps", "clip_grad")), unique=True),
    ),
    st.builds(
        lambda old, new, decline: Preset("batch-size", (old, new), tuple(decline)),
        _ABOVE_0,
        _ABOVE_0,
        st.lists(st.sampled_from(("lr", "betas", "eps", "exp_avg_sq")), unique=True),
    ),
    st.builds(lambda p: Preset("relora", (p,)), _FRACTIONS),
)
COPIES = st.builds(
    Copy,
    st.sampled_from(("decoder.layers.{n}.*", "a.{n}.b.{m}.*")),
    st.sampled_from(("decoder.layers.{n-12}.*", "{n}", "x.{(n+1)*2//3%4}", "output_layer.weight")),
    st.sampled_from(("all", "weights", "moments")),
)
PARAMETERS = st.builds(
    ParameterMap,
    st.lists(_NAMES, unique=True, max_size=2).map(tuple),
    st.lists(_NAMES, unique=True, max_size=2).map(tuple),
    st.lists(COPIES, max_size=2).map(tuple),
)
POLICIES = st.builds(
    lambda keys, **fields: ResumePolicy(
        keep_hyperparameters=keys[0], take_hyperparameters=keys[1], **fields
    ),
    _KEY_PAIRS,
    hyperparameters=st.sampled_from(("args", "checkpoint")),
    schedule=st.sampled_from(("args", "checkpoint")),
    groups=st.lists(GROUP_RULES, max_size=3).map(tuple),
    preset=PRESETS,
    rules=st.lists(st.builds(MomentRule, MATCHES, FOR_EXP_AVG, FOR_EXP_AVG_SQ), max_size=3).map(
        tuple
    ),
    step=st.none() | st.sampled_from(("keep", "reset")) | st.integers(0, 10**9),
    nonfinite=st.sampled_from(("error", "reset", "keep")),
    master_weights=st.sampled_from(("checkpoint", "model")),
    parameters=PARAMETERS,
    strict=st.booleans(),
    schedule_position=st.sampled_from((None, "continue", "restart")),
    grad_scaler=st.sampled_from(("keep", "reset")),
    reset_iteration=st.booleans(),
    reset_dataloader=st.booleans(),
    phase=st.sampled_from(("", "second", "long-context_2.1", "keep", "3")),
)
