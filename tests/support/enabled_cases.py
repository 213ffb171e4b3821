"""Hosts that read a checkpoint with `dist_checkpointing` themselves, as verl and ms-swift do."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path
from typing import Any

from megatron.core.optimizer import get_megatron_optimizer  # bound before `enable`, as in verl

import megatron_ext
from megatron_ext.policy import yaml_file

from . import harness
from .harness import Hyper, Layout


def resumed(
    layout: Layout,
    hyper: Hyper,
    directory: str,
    *,
    policy: str = "{}",
    scheduler: bool = True,
    use_checkpoint: bool = False,
    more: int = 1,
) -> dict[str, Any]:
    """Enable, build, load and train as such a host does; the log of rank 0 is in the result."""
    with contextlib.redirect_stdout(io.StringIO()) as log:
        enabled = megatron_ext.enable(yaml_file.loads(policy))
        run = harness.build(
            layout,
            hyper,
            get_megatron_optimizer,
            override=not use_checkpoint,
            use_checkpoint=use_checkpoint,
        )
        harness.load(run, directory, scheduler=scheduler)
        loaded = harness.snapshot(run)
        harness.train(run, more)
    report = enabled.report
    assert report is not None
    return {
        "loaded": loaded,
        "lrs": run.lrs,
        "losses": run.losses,
        "log": log.getvalue(),
        "first": None if report.scheduler is None else report.scheduler["first_step"],
    }


def refused(layout: Layout, hyper: Hyper, directory: str, how: str) -> dict[str, Any]:
    """The error of a host that does something wrong, and whether anything was changed."""
    from megatron.core import dist_checkpointing

    policy = "schedule: checkpoint" if how == "no scheduler" else "{}"
    megatron_ext.enable(yaml_file.loads(policy))
    run = harness.build(layout, hyper, get_megatron_optimizer)
    metadata = None if how == "no metadata" else harness._metadata(layout)
    before = harness.snapshot(run)
    try:
        with harness.inner_adam(layout.adam):
            if how == "no scheduler":
                harness.load(run, directory, scheduler=False)
                before = harness.snapshot(run)
                harness.train(run, 1)
            request = harness._model_sd(run.model, harness._metadata(layout))
            request["optimizer"] = run.optimizer.sharded_state_dict(
                dict(request), is_loading=how == "no metadata", metadata=metadata
            )
            state = dist_checkpointing.load(request, directory)
            run.optimizer.load_state_dict(state["optimizer"])
    except megatron_ext.MegatronExtError as e:
        after = harness.snapshot(run)
        same = before["groups"] == after["groups"] and before["steps"] == after["steps"]
        return {"type": type(e).__name__, "message": str(e), "unchanged": same}
    return {}


def enabled_twice() -> dict[str, str]:
    """What a second call says: the same policy, then another one."""
    first = yaml_file.loads("preset: reset")
    megatron_ext.enable(first, report_dir="reports")
    megatron_ext.enable(first, report_dir="reports")
    found = {}
    for name, call in {
        "another policy": (yaml_file.loads("preset: reset-momentum"), "reports"),
        "another directory": (first, "elsewhere"),
    }.items():
        try:
            megatron_ext.enable(call[0], report_dir=call[1])
        except megatron_ext.HostError as e:
            found[name] = str(e)
    return found


def counters_agree(layout: Layout, hyper: Hyper, directory: str) -> dict[str, Any]:
    """The counters of a host, the mark that goes into its checkpoints, and another rank's."""
    import torch.distributed as dist

    enabled = megatron_ext.enable(
        yaml_file.loads("counters: {iteration: reset, schedule: continue}")
    )
    run = harness.build(layout, hyper, get_megatron_optimizer)
    assert enabled.counters(iteration=7, consumed_train_samples=56).iteration == 7  # nothing loaded
    harness.load(run, directory)
    try:
        enabled.counters(iteration=4 + dist.get_rank(), consumed_train_samples=32)
        differs = ""
    except megatron_ext.AgreementError as e:
        differs = str(e)
    counters = enabled.counters(iteration=4, consumed_train_samples=32)
    again = enabled.counters(iteration=4, consumed_train_samples=32)
    marks = {
        group["megatron_ext_phase"]
        for inner in harness.inner_optimizers(run.optimizer)
        for group in inner.param_groups
    }
    harness.train(run, 1)
    return {"counters": counters, "again": again, "marks": sorted(marks), "differs": differs}


def as_in_the_guide(
    layout: Layout, hyper: Hyper, directory: str, target: str, code: list[str]
) -> dict[str, Any]:
    """Run the guide's own loop and load; two iterations, a save, and the same again."""
    from megatron.core import dist_checkpointing

    os.chdir(Path(target).parent)  # the guide's report_dir is relative
    guide: dict[str, Any] = {}
    for block in code:
        exec(block, guide)
    run: Any = None
    seen: list[int] = []

    def build() -> Any:
        nonlocal run
        run = harness.build(layout, hyper, get_megatron_optimizer)
        return run.optimizer

    def load(source: str) -> Any:
        def loaded(optimizer: Any) -> tuple[int, int]:
            model = harness._model_sd(run.model, harness._metadata(layout))
            guide["load"](model, optimizer, run.scheduler, source)
            iteration = dist_checkpointing.load_common_state_dict(source)["iteration"]
            return iteration, iteration * harness.GLOBAL_BATCH

        return loaded

    def step(optimizer: Any, iteration: int, samples: int) -> tuple[int, int]:
        seen.append(iteration)
        harness.train(run, 1)
        return iteration + 1, samples + harness.GLOBAL_BATCH

    def save(optimizer: Any, iteration: int, samples: int) -> None:
        run.iteration = iteration
        harness.save(run, target)

    policy = yaml_file.loads("counters: {iteration: reset, dataloader: reset}")
    guide["train"](policy, build, load(directory), save, step, 2)
    guide["train"](policy, build, load(target), save, step, 4)
    return {"iterations": seen, "lrs": run.lrs}
