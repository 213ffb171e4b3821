"""When the moments are changed without a look at them before, and what is found then."""

from __future__ import annotations

import pytest
import torch

from megatron_ext.base.placement import block_of
from megatron_ext.plan.parameters import Parameter, ParameterPlan, Rows
from megatron_ext.policy import yaml_file
from megatron_ext.resume.apply_rules import apply_in_one_pass
from megatron_ext.resume.nonfinite import Unusable
from megatron_ext.resume.parameters import Shard
from megatron_ext.resume.prepare_rules import MomentWork
from megatron_ext.rules.base import ElementRule
from megatron_ext.rules.elementwise import KEEP, Fill, Scale

SCALE = "moments: [{match: '*', exp_avg: keep, exp_avg_sq: scale 4}]"


def _work(rule: ElementRule, dtype: torch.dtype, policy: str = SCALE) -> MomentWork:
    """Two parameters; the second has a NaN, an infinite element and one that the rule makes so."""
    shards, plans = [], {}
    for name, values in {
        "good": [1.0, 2.0, 3.0],
        "bad": [float("nan"), float("-inf"), torch.finfo(dtype).max],
        "large": [0.0, torch.finfo(dtype).max, 1.0],
    }.items():
        key = torch.zeros(3)
        inner = torch.optim.AdamW([key])
        inner.state[key]["exp_avg"] = torch.ones(3, dtype=dtype)
        inner.state[key]["exp_avg_sq"] = torch.tensor(values, dtype=dtype)
        parameter = Parameter(name, (3,), 0)
        shards.append(Shard(parameter, (block_of((3,), (0,), (3,)),), 0, 3, inner, key))
        plans[name] = ParameterPlan(parameter, (Rows(0, 3, KEEP, rule, 0),))
    return MomentWork(yaml_file.loads(policy), tuple(shards), plans, frozenset({0}))


def test_what_was_not_finite_is_told_from_what_the_change_made_so() -> None:
    done = apply_in_one_pass(_work(Scale(4.0), torch.float32))
    assert done is not None
    assert done.unusable_before == {
        "bad": Unusable(nonfinite={"exp_avg_sq": 3}, negative={"exp_avg_sq": 0})
    }
    by_name = {s.parameter.name: c for s, c in zip(done.shards, done.counted, strict=True)}
    assert {name: c["exp_avg_sq"].nonfinite for name, c in by_name.items()} == {
        "good": 0,
        "bad": 3,
        "large": 1,
    }
    good = done.shards[0].inner.state[done.shards[0].key]["exp_avg_sq"]
    assert good.tolist() == [4.0, 8.0, 12.0]


@pytest.mark.parametrize(
    "work",
    [
        None,
        _work(Fill(0.0), torch.float32),
        _work(Scale(4.0), torch.float16),
        _work(Scale(4.0), torch.float32, "{nonfinite: reset, " + SCALE + "}"),
    ],
    ids=["nothing to do", "overwritten", "fp16", "to be mended"],
)
def test_otherwise_they_are_looked_at_first(work: MomentWork | None) -> None:
    assert apply_in_one_pass(work) is None
    if work is not None:
        assert work.shards[0].inner.state[work.shards[0].key]["exp_avg_sq"].tolist() == [1, 2, 3]
