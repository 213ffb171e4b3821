"""What does not fit the scheduler is said in words where Megatron asserts without a message."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.host.schedule import refusal, values_of
from megatron_ext.plan import preflight
from megatron_ext.policy.flags import add_flags
from tests.support.checkpoints import DEFAULTS, checkpoint

#: Arguments of a schedule that Megatron accepts, as its parser gives them.
SCHEDULE: dict[str, Any] = {
    "lr": 1e-3,
    "min_lr": 1e-4,
    "lr_decay_style": "cosine",
    "lr_wsd_decay_style": "exponential",
    "lr_wsd_decay_iters": None,
    "lr_wsd_decay_samples": None,
    "lr_warmup_init": 0.0,
    "weight_decay": 0.1,
    "start_weight_decay": None,
    "end_weight_decay": None,
    "weight_decay_incr_style": "constant",
}
RAMP = {"weight_decay_incr_style": "linear", "start_weight_decay": 0.1, "end_weight_decay": 0.2}

#: Case -> what differs, what the error says, and the way out that it names.
REFUSED: dict[str, tuple[dict[str, Any], list[str], dict[str, Any]]] = {
    "a rate below the smallest": (
        {"lr": 1e-5},
        ["--lr 1e-05 is below --min-lr 0.0001", "Write --min-lr 1e-05 or less"],
        {"min_lr": 1e-5},
    ),
    "a negative smallest rate": ({"min_lr": -1.0}, ["--min-lr -1", "at least 0"], {"min_lr": 0.0}),
    "a warm-up from above": (
        {"lr_warmup_init": 1e-2},
        ["--lr-warmup-init 0.01 is above --lr 0.001", "Write --lr-warmup-init 0.001 or less"],
        {"lr_warmup_init": 1e-3},
    ),
    "no decay": (
        {"lr_decay_iters": 0},
        ["--lr-decay-iters 0", "at least 1", "leave it out"],
        {"lr_decay_iters": None},
    ),
    "a warm-up as long as the decay": (
        {"lr_warmup_iters": 40},
        ["--lr-warmup-iters 40", "decay of 40 iters", "longer or the warm-up shorter"],
        {"lr_decay_iters": 41},
    ),
    "a warm-up of all": (
        {"lr_warmup_fraction": 1.0},
        ["--lr-warmup-fraction 1", "below 1"],
        {"lr_warmup_fraction": 0.9},
    ),
    "WSD without its length": (
        {"lr_decay_style": "WSD"},
        ["--lr-decay-style WSD without --lr-wsd-decay-iters", "Write --lr-wsd-decay-iters"],
        {"lr_wsd_decay_iters": 5},
    ),
    "WSD without its length in samples": (
        {
            "lr_decay_style": "WSD",
            "train_iters": None,
            "lr_decay_iters": None,
            "train_samples": 160,
            "lr_wsd_decay_iters": 5,
        },
        ["--lr-decay-style WSD without --lr-wsd-decay-samples"],
        {"lr_wsd_decay_samples": 40},
    ),
    "a ramp that falls": (
        {**RAMP, "start_weight_decay": 0.3},
        ["--start-weight-decay 0.3 --end-weight-decay 0.2: this ramp falls", "constant with"],
        {
            "weight_decay_incr_style": "constant",
            "start_weight_decay": None,
            "end_weight_decay": None,
        },
    ),
    "a ramp from below 0": (
        {**RAMP, "start_weight_decay": -0.1},
        ["--start-weight-decay -0.1", "begins below 0"],
        {"start_weight_decay": 0.0},
    ),
    "half a ramp": (
        {**RAMP, "end_weight_decay": None},
        ["linear with --start-weight-decay 0.1: a ramp needs both", "--end-weight-decay"],
        {"end_weight_decay": 0.1},
    ),
    "a constant with the ends of a ramp": (
        {"start_weight_decay": 0.1, "end_weight_decay": 0.2},
        ["--start-weight-decay 0.1 --end-weight-decay 0.2 with", "--weight-decay 0.1", "linear"],
        {"weight_decay_incr_style": "linear"},
    ),
    "a constant with its own value twice": (
        {"start_weight_decay": 0.1, "end_weight_decay": 0.1},
        ["--start-weight-decay 0.1 --end-weight-decay 0.1 with", "Leave them out"],
        {"start_weight_decay": None, "end_weight_decay": None},
    ),
    "a negative constant": (
        {"weight_decay": -0.1},
        ["--weight-decay -0.1", "at least 0"],
        {"weight_decay": 0.0},
    ),
    "what has no words of its own": (
        {"lr_decay_style": "zigzag"},
        ["Exception: zigzag decay style is not supported", "--lr-decay-style", "--min-lr"],
        {"lr_decay_style": "linear"},
    ),
    "an assertion without a message": (
        {"lr": float("nan")},
        ["AssertionError: assert self.max_lr >= self.min_lr", "--lr, --min-lr"],
        {"lr": 1e-3},
    ),
}
#: Refused by Megatron's validation, before it constructs a scheduler.
BY_VALIDATION = {"half a ramp", "a constant with the ends of a ramp"} | {
    "a constant with its own value twice"
}


def arguments(root: Path, flags: str = "", **changes: Any) -> argparse.Namespace:
    parser = add_flags(argparse.ArgumentParser(allow_abbrev=False))
    given = {**DEFAULTS, **SCHEDULE, "load": str(root), **changes}
    words = f"--optimizer-class megatron_ext.SelectiveAdam {flags}".split()
    return parser.parse_args(words, argparse.Namespace(**given))


def problems(args: argparse.Namespace) -> list[str]:
    return [str(e) for e in preflight.examine(args).errors]


@pytest.mark.matrix
@pytest.mark.parametrize("case", REFUSED)
def test_what_megatron_asserts_is_one_error_with_a_way_out(case: str, tmp_path: Path) -> None:
    changes, words, way_out = REFUSED[case]
    root = checkpoint(tmp_path / "one")
    args = arguments(root, **changes)
    assert (refusal(values_of(args)) is None) == (case in BY_VALIDATION)
    (error,) = problems(args)
    for word in words:
        assert word in error
    fixed = arguments(root, **{**changes, **way_out})
    assert refusal(values_of(fixed)) is None
    assert problems(fixed) == []


def test_a_rate_and_one_source_of_the_schedule_are_needed(tmp_path: Path) -> None:
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    root = checkpoint(tmp_path / "one")
    (error,) = problems(arguments(root, lr=None))
    assert "no --lr" in error
    flags = ("override_opt_param_scheduler", "use_checkpoint_opt_param_scheduler")
    both = dict.fromkeys(flags, True)
    values = asdict(values_of(arguments(root)))
    with pytest.raises(AssertionError):
        OptimizerParamScheduler(argparse.Namespace(param_groups=[]), **values, **both)
    (error,) = problems(arguments(root, **both))
    assert "--override-opt_param-scheduler takes the schedule from the arguments" in error
    assert "Leave one of the two out" in error
    for flag in flags:
        assert problems(arguments(root, **{flag: True})) == []


@pytest.mark.parametrize(
    "changes",
    [
        {},
        RAMP,
        {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 5},
        {"global_batch_size": None},
        {"min_lr": 1e-3},
        # A run that only evaluates has no schedule.
        {"skip_train": True, "lr_decay_style": "WSD", "lr_warmup_iters": 40},
        # What Megatron's validation makes of a constant.
        {"start_weight_decay": 0.1, "end_weight_decay": 0.1, "consumed_train_samples": 0},
        # A legacy checkpoint is loaded with it too.
        {"no_save_optim": True},
    ],
)
def test_what_megatron_accepts_is_not_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    assert problems(arguments(checkpoint(tmp_path / "one"), **changes)) == []


def test_a_schedule_from_the_checkpoint_does_not_save_the_arguments(tmp_path: Path) -> None:
    """Megatron constructs its scheduler from them before it loads anything."""
    state = {"min_lr": 1e-6, "lr_decay_style": "WSD"}
    root = checkpoint(tmp_path / "one", scheduler=state, changes={"lr_wsd_decay_iters": 20})
    taken = {"use_checkpoint_opt_param_scheduler": True}
    (error,) = problems(arguments(root, lr=1e-5, lr_wsd_decay_iters=20, **taken))
    assert "--lr 1e-05 is below --min-lr 0.0001" in error
    (error,) = problems(arguments(root, lr_decay_style="WSD", **taken))
    assert "--lr-decay-style WSD without --lr-wsd-decay-iters" in error
    assert problems(arguments(root, lr_wsd_decay_iters=20, **taken)) == []


def test_half_of_a_ramp_from_the_checkpoint_needs_a_ramp(tmp_path: Path) -> None:
    state = {"start_wd": 0.0, "end_wd": 0.1, "wd_incr_style": "linear", "wd_incr_steps": 160}
    root = checkpoint(tmp_path / "one", scheduler=state)
    keep = "--selective-keep-hyperparameters"
    (error,) = problems(arguments(root, f"{keep} start_wd"))
    assert "start_wd 0.0 of the checkpoint" in error
    assert "from 0 to 0.1" in error
    assert "Keep weight_decay" in error
    assert problems(arguments(root, f"{keep} weight_decay")) == []
    assert problems(arguments(root)) == []
    # Bounds of two runs that do not fit are no reason: a load does not check them.
    low = checkpoint(tmp_path / "two", scheduler={"max_lr": 1e-5})
    assert problems(arguments(low, f"{keep} max_lr")) == []


def test_without_the_optimizer_to_save_megatron_requests_none(tmp_path: Path) -> None:
    root = checkpoint(tmp_path / "one", format="torch_dist")
    (error,) = problems(arguments(root, no_save_optim=True))
    assert "--no-save-optim with a torch_dist checkpoint" in error
    assert "Leave the flag out" in error
    assert problems(arguments(root, no_save_optim=True, no_load_optim=True)) == []
