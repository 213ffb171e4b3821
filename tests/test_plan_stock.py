"""What ``plan`` says of stock Megatron is what stock Megatron does, with each version."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from packaging.version import Version

from megatron_ext import forecast as module
from megatron_ext.forecast import forecast
from megatron_ext.host.contract import megatron_version
from megatron_ext.host.stock import identifier_keys
from megatron_ext.stored import open_checkpoint
from tests.conftest import FIRST, Checkpoints
from tests.support.harness import Hyper, Layout
from tests.support.planned import words
from tests.support.pool import Failure, RankPool

pytestmark = pytest.mark.ranks

BF16 = Layout()
FULL = replace(BF16, format="fully_reshardable")
LEGACY = replace(BF16, format="torch")
REPLICATED = replace(BF16, distributed=False)
MOE = Layout(experts=4, ep=2)
FP32 = {"bf16": False, "fp16": False}

LOWER = {"lr": 1e-3, "min_lr": 1e-4}
ADAM = {"betas": (0.8, 0.9), "eps": 1e-6}


@dataclass(frozen=True)
class Cell:
    """A layout, what its second phase changes, and what stock makes of it.

    `outcome` and `old` are of 0.19 and of the versions before it.
    """

    layout: Layout
    changes: dict[str, Any]
    outcome: str
    old: str
    override: bool = True
    use_checkpoint: bool = False
    saved: dict[str, Any] = field(default_factory=dict)


CELLS = {
    "unchanged": Cell(BF16, {}, "loads", "loads"),
    "lower lr": Cell(BF16, LOWER, "fails", "keeps"),
    "lower lr, fully_reshardable": Cell(FULL, LOWER, "fails", "keeps"),
    "lower lr, legacy": Cell(LEGACY, LOWER, "fails", "keeps"),
    "lower lr, replicated": Cell(REPLICATED, LOWER, "fails", "keeps"),
    "lower lr, moe": Cell(MOE, LOWER, "fails", "keeps"),
    "adam": Cell(BF16, ADAM, "keeps", "keeps"),
    "adam, replicated": Cell(REPLICATED, ADAM, "keeps", "keeps"),
    "weight decay and length": Cell(
        BF16, {"weight_decay": 0.05, "train_iters": 60, "warmup_iters": 3}, "loads", "loads"
    ),
    "length without the flag": Cell(BF16, {"train_iters": 60}, "fails", "fails", override=False),
    "from the checkpoint": Cell(
        BF16,
        {"weight_decay": 0.05, "train_iters": 60, "decay_style": "linear"},
        "loads",
        "loads",
        override=False,
        use_checkpoint=True,
    ),
    "fp32": Cell(replace(BF16, dtype="fp32"), {}, "fails", "fails", saved=FP32),
    "fp32, fully_reshardable": Cell(replace(FULL, dtype="fp32"), {}, "loads", "loads", saved=FP32),
    "torch's AdamW": Cell(replace(BF16, adam="torch"), {}, "fails", "fails"),
}


@pytest.mark.parametrize("name", CELLS)
def test_stock_does_what_is_said(
    name: str,
    stock: RankPool,
    checkpoints: Checkpoints,
    megatron: Version,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cell = CELLS[name]
    directory, _ = checkpoints.phase_1(cell.layout, 2)
    hyper: Hyper = replace(FIRST, **cell.changes)

    def with_arguments(*args: Any) -> Any:
        found = open_checkpoint(*args)
        return replace(found, args={**found.args, **cell.saved})

    monkeypatch.setattr(module, "open_checkpoint", with_arguments)
    flags = ["--override-opt_param-scheduler"] if cell.override else []
    flags += ["--use-checkpoint-opt_param-scheduler"] if cell.use_checkpoint else []
    said = forecast(directory, [*words(hyper), *flags]).stock
    assert said is not None
    assert Version(said.version) == megatron
    assert said.tested
    assert said.outcome == (cell.outcome if megatron >= Version("0.19") else cell.old)
    done = stock.run(
        "tests.support.oracle:stock_resume",
        2,
        layout=cell.layout,
        hyper=hyper,
        directory=directory,
        more=1,
        override=cell.override,
        use_checkpoint=cell.use_checkpoint,
        allow_failure=True,
    )[0]
    if said.outcome == "fails":
        assert isinstance(done, Failure)
        kind, _, message = said.error.partition(": ")
        assert done.type == kind
        # An assertion may have no message of its own.
        assert message.split(" in loaded")[0] in done.message or not done.message
        assert said.first_step == ()
        return
    assert not isinstance(done, Failure), done
    assert [s.lr for s in said.first_step] == done["lrs"][0]
    assert [s.weight_decay for s in said.first_step] == done["wds"][0]
    groups = done["loaded"]["groups"]
    assert len(said.groups) == len(groups) > 1
    for group, live in zip(said.groups, groups, strict=True):
        for key, (kept, argument) in group.kept.items():
            assert live[key] == kept != argument
        if set(cell.changes) & {"betas", "eps"}:
            assert set(group.kept) >= {"betas", "eps"}
        if set(cell.changes) & {"lr"}:
            assert set(group.kept) >= {"max_lr", "min_lr"}


def test_the_keys_that_tell_groups_apart_are_upstreams(ext: RankPool, megatron: Version) -> None:
    found = ext.run("tests.support.host_cases:identifier_keys", 1)[0]
    assert identifier_keys(str(megatron)) == tuple(found)
    assert Version(megatron_version()) == megatron
