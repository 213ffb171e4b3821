"""`megatron_ext.resume.moments.transform`: rules on an optimizer's own state."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ext._ops.segments import Statistics
from megatron_ext.errors import PlanError
from megatron_ext.resume import moments
from megatron_ext.resume.moments import transform
from megatron_ext.resume.shard_rules import MomentShard, RangeRule
from megatron_ext.rules.batch_size import BatchSize
from megatron_ext.rules.elementwise import Fill, Keep, Scale
from megatron_ext.rules.form import MOMENTS
from megatron_ext.rules.prune import PruneRandom
from tests.support.moments import oracle


class OpCalls(TorchDispatchMode):
    """Counts the calls of this package's ops."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "megatron_ext":
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.fixture
def adamw() -> torch.optim.AdamW:
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s)) for s in ((4, 6), (10,), (0,))]
    optimizer = torch.optim.AdamW(params, lr=1e-3)
    for _ in range(3):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    return optimizer


def parameters(optimizer: Any) -> Iterator[torch.Tensor]:
    yield from (p for group in optimizer.param_groups for p in group["params"])


def shards(optimizer: Any, *rules: tuple[RangeRule, ...]) -> list[MomentShard]:
    return [
        MomentShard(f"layer.{i}.weight", optimizer, p, r)
        for i, (p, r) in enumerate(zip(parameters(optimizer), rules, strict=True))
    ]


def state(optimizer: Any) -> list[dict[str, torch.Tensor]]:
    return [{k: v.clone() for k, v in optimizer.state[p].items()} for p in parameters(optimizer)]


def test_one_call_of_the_op_changes_what_the_rules_say_and_nothing_else(
    adamw: torch.optim.AdamW,
) -> None:
    before = state(adamw)
    weights = [p.detach().clone() for p in parameters(adamw)]
    batch_size = BatchSize(4.0, (0.9, 0.999), 3)
    rules = (
        (RangeRule(0, 6, Scale(0.5), Scale(0.25)), RangeRule(12, 24, Fill(0.0), Keep())),
        (RangeRule(0, 10, Keep(), batch_size),),
        (),
    )
    with OpCalls() as calls:
        found = transform(shards(adamw, *rules), Statistics.BEFORE_AND_AFTER)
    assert calls.names == ["megatron_ext::transform_moments_"]
    after = state(adamw)
    for key, factor in zip(MOMENTS, (0.5, 0.25), strict=True):
        flat, old = after[0][key].flatten(), before[0][key].flatten()
        assert torch.equal(flat[:6], old[:6] * factor)
        assert torch.equal(flat[6:12], old[6:12])
    assert not after[0]["exp_avg"].flatten()[12:].any()
    assert torch.equal(
        after[0]["exp_avg_sq"].flatten()[12:], before[0]["exp_avg_sq"].flatten()[12:]
    )
    assert torch.equal(after[1]["exp_avg"], before[1]["exp_avg"])
    m, v = (before[1][k].numpy() for k in MOMENTS)
    expected = oracle(batch_size, v, m, m, 0)
    assert after[1]["exp_avg_sq"].numpy() == pytest.approx(expected, rel=1e-6)
    assert all(torch.equal(a["step"], b["step"]) for a, b in zip(after, before, strict=True))
    assert all(torch.equal(p, w) for p, w in zip(parameters(adamw), weights, strict=True))

    for i, row in enumerate(found):
        for key in MOMENTS:
            old, new = before[i][key].double(), after[i][key].double()
            assert row[key].norm_before == pytest.approx(old.norm().item(), rel=1e-6)
            assert row[key].norm_after == pytest.approx(new.norm().item(), rel=1e-6)
            assert row[key].largest == (new.abs().max().item() if new.numel() else 0.0)
            assert row[key].nonfinite == 0
            assert row[key].changed == (old != new).sum().item()


def test_without_statistics_there_are_none(adamw: torch.optim.AdamW) -> None:
    rules = (RangeRule(0, 10, Scale(2.0), Keep()),)
    assert transform(shards(adamw, (), rules, ())) == [{}, {}, {}]
    after = transform(shards(adamw, (), rules, ()), Statistics.AFTER)
    assert after[1]["exp_avg"].norm_before is None
    assert after[1]["exp_avg"].changed is None
    assert after[1]["exp_avg"].norm_after > 0.0


def test_a_parameter_without_state_is_named() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([p])
    with pytest.raises(PlanError, match=r"layer\.0\.weight has no exp_avg to change"):
        transform(shards(optimizer, (RangeRule(0, 3, Fill()),)))


def test_a_range_outside_a_shard_is_refused_before_any_parameter_is_changed(
    adamw: torch.optim.AdamW,
) -> None:
    before = state(adamw)
    rules = ((RangeRule(0, 24, Fill()),), (RangeRule(0, 11, Fill()),), ())
    with pytest.raises(RuntimeError, match="elements 0 to 11 are not within tensor 1 of 10"):
        transform(shards(adamw, *rules))
    for a, b in zip(state(adamw), before, strict=True):
        assert torch.equal(a["exp_avg"], b["exp_avg"])


def test_random_rules_depend_on_the_parameters_name(adamw: torch.optim.AdamW) -> None:
    other = copy.deepcopy(adamw)
    rule = (RangeRule(0, 24, PruneRandom(0.5), PruneRandom(0.5)),)
    transform(shards(adamw, rule, (), ()))
    p = next(parameters(other))
    transform([MomentShard("another.name", other, p, rule)])
    one = adamw.state[next(parameters(adamw))]
    assert torch.equal(one["exp_avg"] == 0, one["exp_avg_sq"] == 0)
    assert not torch.equal(one["exp_avg"] == 0, other.state[p]["exp_avg"] == 0)


def test_the_kernel_is_named_once(
    adamw: torch.optim.AdamW, capsys: pytest.CaptureFixture[str]
) -> None:
    moments.announce.cache_clear()
    for _ in range(2):
        transform(shards(adamw, (), (), ()))
    out = capsys.readouterr().out
    assert out.startswith("megatron_ext: moments on cpu: compiled kernel (built for torch")
    assert out.count("\n") == 1


def test_thresholds_are_found_for_groups_of_parameters(adamw: torch.optim.AdamW) -> None:
    rules: tuple[tuple[RangeRule, ...], ...] = ((), (), ())
    found = moments.magnitude_thresholds(shards(adamw, *rules), "exp_avg_sq", [0, 0, 1], [0.5, 0.5])
    values = torch.cat([adamw.state[p]["exp_avg_sq"].flatten() for p in parameters(adamw)])
    rank = math.floor(0.5 * (len(values) - 1))
    assert found == [values.abs().sort().values[rank].item(), 0.0]


class ScaledAdam(torch.optim.AdamW):
    """The two methods and the tables of TE's FusedAdam with fp16 moments.

    As in transformer_engine/pytorch/optimizers/fused_adam.py: value = stored * scale. TE itself
    needs a GPU (tests/_ops/test_gpu.py).
    """

    def __init__(self, params: list[torch.nn.Parameter]) -> None:
        super().__init__(params)
        self.name_to_dtype_map = {k: torch.float16 for k in MOMENTS}
        self._scales: dict[torch.Tensor, dict[str, torch.Tensor]] = {}
        self.calls: list[str] = []

    def get_unscaled_state(self, param: torch.Tensor, name: str) -> torch.Tensor:
        return self.state[param][name].float() * self._scales[param][name]

    def set_scaled_state(self, param: torch.Tensor, name: str, unscaled: torch.Tensor) -> None:
        self.calls.append(name)
        scale = unscaled.abs().max() / (torch.finfo(torch.float16).max / 2)
        self._scales.setdefault(param, {})[name] = scale.reshape(1)
        self.state[param][name] = (unscaled / scale).half()


@pytest.fixture
def scaled() -> ScaledAdam:
    torch.manual_seed(1)
    p = torch.nn.Parameter(torch.randn(100))
    optimizer = ScaledAdam([p])
    optimizer.set_scaled_state(p, "exp_avg", torch.randn(100) * 1e-5)
    optimizer.set_scaled_state(p, "exp_avg_sq", torch.rand(100) * 1e-10)
    optimizer.state[p]["master_param"] = p.detach().clone()
    optimizer.calls.clear()
    return optimizer


@pytest.mark.parametrize("statistics", list(Statistics))
def test_a_rescale_of_a_te_stand_ins_moment_changes_its_scale_alone(
    scaled: ScaledAdam, statistics: Statistics
) -> None:
    (p,) = parameters(scaled)
    before = {k: v.clone() for k, v in scaled.state[p].items()}
    scales = {k: v.clone() for k, v in scaled._scales[p].items()}
    rules = (RangeRule(0, 100, Scale(0.5), Scale(0.25)),)
    with OpCalls() as calls:
        (found,) = transform(shards(scaled, rules), statistics)
    assert scaled.calls == []
    # Without statistics not one element is read.
    assert len(calls.names) == (1 if statistics else 0)
    assert all(torch.equal(scaled.state[p][k], before[k]) for k in before)
    assert scaled._scales[p]["exp_avg"] == scales["exp_avg"] * 0.5
    assert scaled._scales[p]["exp_avg_sq"] == scales["exp_avg_sq"] * 0.25
    if statistics:
        value = scaled.get_unscaled_state(p, "exp_avg").double()
        assert found["exp_avg"].norm_after == pytest.approx(value.norm().item(), rel=1e-6)


def test_other_rules_go_through_the_te_stand_ins_own_methods(scaled: ScaledAdam) -> None:
    (p,) = parameters(scaled)
    old = {k: scaled.get_unscaled_state(p, k) for k in MOMENTS}
    transform(shards(scaled, (RangeRule(0, 40, Fill(0.0), Keep()),)))
    assert scaled.calls == ["exp_avg"]
    new = {k: scaled.get_unscaled_state(p, k) for k in MOMENTS}
    assert not new["exp_avg"][:40].any()
    torch.testing.assert_close(new["exp_avg"][40:], old["exp_avg"][40:], rtol=2e-3, atol=1e-9)
    assert torch.equal(new["exp_avg_sq"], old["exp_avg_sq"])
    transform(shards(scaled, (RangeRule(0, 100, Keep(), BatchSize(2.0, (0.9, 0.95), 9)),)))
    assert scaled.calls == ["exp_avg", "exp_avg_sq"]
    assert torch.equal(scaled.state[p]["master_param"], p.detach())
