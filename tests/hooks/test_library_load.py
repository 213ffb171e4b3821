"""Megatron's load functions where its global arguments are not set, as in a library's use."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_ext.errors import CheckpointError, HostError
from megatron_ext.hooks import counters, loading, scheduling
from megatron_ext.policy.counters import Counters
from megatron_ext.policy.phase import decide
from megatron_ext.policy.policy import ResumePolicy
from megatron_ext.resume.session import Resume, current
from tests.support.reports import optimizer_report

SAVED = Counters(10, 80, num_steps=80)
RESTARTED = Counters(0, 80, num_steps=0)


@pytest.fixture
def resume(monkeypatch: pytest.MonkeyPatch) -> Iterator[Resume]:
    """The resume of one optimizer; there are no global arguments."""
    for module in (loading, counters, scheduling):
        monkeypatch.setattr(module, "global_args", lambda: None)
    resume = Resume(ResumePolicy(reset_iteration=True))
    resume.join(SimpleNamespace(resume=resume))
    yield resume
    current.load = current.resumed = None


def load(resume: Resume, *, optimizer: bool = True, raises: Exception | None = None) -> Any:
    """Load as Megatron does, with a function in place of its own."""

    def stock(model: Any, optimizer_: Any, scheduler: Any) -> tuple[int, int]:
        if raises is not None:
            raise raises
        if optimizer:
            phase = decide(resume.policy, None, "one@10#0").at(80)
            resume.announce(phase, None, SAVED, RESTARTED)
            report = optimizer_report()
            resume.done(resume.members[0], replace(report, plan=replace(report.plan, phase=phase)))
        return 10, 7

    return loading.load_checkpoint(stock)([], resume.members[0], None)


def test_the_load_returns_the_iteration_of_its_counters(resume: Resume) -> None:
    assert load(resume) == (0, 7)


@pytest.mark.parametrize(
    "args",
    [
        None,
        argparse.Namespace(),
        argparse.Namespace(train_samples=160),
        argparse.Namespace(rampup_batch_size=["4", "2", "40"]),
        argparse.Namespace(global_batch_size=8),
    ],
)
def test_a_length_that_is_not_known_is_left_alone(
    args: argparse.Namespace | None, resume: Resume
) -> None:
    load(resume)
    before = None if args is None else dict(vars(args))
    assert counters.after_the_load(resume, args) == 0
    assert before == (None if args is None else vars(args))
    assert counters.length_of_run(resume, args)["train_iters"] is None


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("error", [None, CheckpointError("a file is missing")])
def test_the_override_flag_is_hidden_from_the_load_and_restored(
    given: bool,
    error: CheckpointError | None,
    resume: Resume,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From 0.20 on Megatron's load ends with lr and min_lr of the arguments in every group."""
    args = argparse.Namespace(override_opt_param_scheduler=given, no_load_optim=True)
    monkeypatch.setattr(loading, "global_args", lambda: args)
    resume.policy = ResumePolicy()
    seen = []

    def stock(model: Any, optimizer: Any, scheduler: Any) -> tuple[int, int]:
        seen.append(args.override_opt_param_scheduler)
        if error is not None:
            raise error
        return 10, 7

    wrapped = loading.load_checkpoint(stock)
    with contextlib.nullcontext() if error is None else pytest.raises(CheckpointError):
        wrapped([], resume.members[0], None)
    assert seen == [False]
    assert args.override_opt_param_scheduler is given
    # Without an optimizer of this package nothing is hidden.
    seen.clear()
    with contextlib.nullcontext() if error is None else pytest.raises(CheckpointError):
        wrapped([], None, None)
    assert seen == [given]


def test_a_length_in_samples_is_set(resume: Resume) -> None:
    load(resume)
    args = argparse.Namespace(train_samples=160, global_batch_size=16)
    assert counters.after_the_load(resume, args) == 0
    assert args.train_iters == 10


def test_a_checkpoint_without_optimizer_is_one_error(
    resume: Resume, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CheckpointError, match="no optimizer state"):
        load(resume, raises=KeyError("optimizer"))
    monkeypatch.setattr(loading, "_loaded_iteration", lambda: 10)
    with pytest.raises(CheckpointError, match="no optimizer state came with it"):
        load(resume, optimizer=False)


def test_a_schedule_from_the_checkpoint_without_the_length_of_its_decay() -> None:
    resume = Resume(ResumePolicy(schedule="checkpoint"))
    values = dict.fromkeys((*scheduling.SCHEDULER_VALUES, *scheduling.NOT_SAVED))
    scheduler = SimpleNamespace(
        **values,
        optimizer=SimpleNamespace(resume=resume),
        override_opt_param_scheduler=False,
        use_checkpoint_opt_param_scheduler=False,
    )
    wrapped = scheduling.load_scheduler(lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(HostError, match="--lr-wsd-decay-iters"):
        wrapped(scheduler, {"lr_decay_style": "WSD", "num_steps": 80})
