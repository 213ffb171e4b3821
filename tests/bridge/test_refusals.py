"""What `resume_with` refuses: one error each, which names the field, before anything is changed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_ext import Preset, ResumePolicy
from megatron_ext.policy.request import Request
from tests.bridge.conftest import FIRST, TRAIN, FirstPhases
from tests.support.bridge_calls import Case, stock_optimizer
from tests.support.bridge_runs import Bridge
from tests.support.pool import Failure, RankPool

pytestmark = pytest.mark.ranks

RESET = {"policy": ResumePolicy(preset=Preset("reset"))}


def changed(**changes: Any) -> Bridge:
    """A config with other values in its section `checkpoint`."""
    return Bridge(1, changes={f"checkpoint.{k}": v for k, v in changes.items()})


def cases(start: str, own: str) -> dict[str, tuple[Case, str, tuple[str, ...]]]:
    """Name -> the call, the type of its error, and what the error says."""
    later = {"start": start}
    data = {"policy": ResumePolicy(reset_dataloader=True)}
    iteration = {"policy": ResumePolicy(reset_iteration=True)}
    manager = "somewhere.Manager"
    return {
        "finetune": (
            Case(changed(finetune=True)),
            "HostError",
            ("checkpoint.finetune=True", "Set it to False", "reset_iteration"),
        ),
        "load_optim": (
            Case(changed(load_optim=False), RESET),
            "PolicyError",
            ("checkpoint.load_optim=False with preset reset", "to True"),
        ),
        "peft": (
            Case(Bridge(1, changes={"peft": ResumePolicy()})),
            "HostError",
            ("peft=ResumePolicy", "set peft to None"),
        ),
        "pretrained_checkpoint": (
            Case(changed(pretrained_checkpoint=start, load=own)),
            "HostError",
            (f"checkpoint.pretrained_checkpoint={start}", f"checkpoint.load={own}", "as start"),
        ),
        "a restart in the process": (
            Case(Bridge(1, changes={"inprocess_restart": SimpleNamespace(enabled=True)})),
            "HostError",
            ("inprocess_restart.enabled=True", "Set it to False"),
        ),
        "torch FSDP2": (
            Case(Bridge(1, changes={"dist.use_torch_fsdp2": True})),
            "HostError",
            ("dist.use_torch_fsdp2=True",),
        ),
        "a local checkpoint": (
            Case(changed(non_persistent_ckpt_type="local")),
            "HostError",
            ("checkpoint.non_persistent_ckpt_type='local'", "'global' or None"),
        ),
        "another manager": (
            Case(changed(custom_manager_class=manager)),
            "HostError",
            (f"checkpoint.custom_manager_class={manager}", "megatron_ext.enable"),
        ),
        "Energon's data position": (
            Case(Bridge(1), data, energon=True),
            "PolicyError",
            ("reset_dataloader with an Energon dataset", "Add reset_iteration"),
        ),
        "Energon's iteration": (
            Case(Bridge(1), iteration, energon=True),
            "PolicyError",
            ("reset_iteration with an Energon dataset", "Add reset_dataloader"),
        ),
        "start is the own directory": (
            Case(Bridge(1, save=start), later),
            "PolicyError",
            (f"start {start} is also the directory of checkpoint.load or checkpoint.save",),
        ),
        "two own directories": (
            Case(Bridge(1, load=f"{own}/a", save=f"{own}/b"), later),
            "PolicyError",
            (f"checkpoint.load {own}/a and checkpoint.save {own}/b", "expected one directory"),
        ),
        "non-persistent elsewhere": (
            Case(changed(non_persistent_global_ckpt_dir=own, save=own), later),
            "PolicyError",
            (f"checkpoint.non_persistent_global_ckpt_dir {own}",),
        ),
        "start without a checkpoint": (
            Case(Bridge(1, save=f"{own}/a"), {"start": own}),
            "CheckpointError",
            (f"start={own}", "finds none there"),
        ),
        "no policy file": (
            Case(Bridge(1), {"policy": f"{own}/policy.yaml"}),
            "PolicyError",
            (f"policy {own}/policy.yaml: cannot be read",),
        ),
        "two policies": (
            Case(Bridge(1), {}, then=RESET),
            "HostError",
            ("called twice with different requests", "reset", "make it in one place"),
        ),
    }


def test_every_refusal_names_the_field_and_changes_nothing(
    bridge: RankPool, first: FirstPhases, tmp_path: Path
) -> None:
    table = cases(first(1)[0], str(tmp_path))
    only = {name: case for name, (case, _, _) in table.items()}
    (found,) = bridge.run("tests.support.bridge_calls:calls", 1, cases=only)
    for name, (_, kind, said) in table.items():
        assert found[name]["type"] == kind, (name, found[name])
        assert [text for text in said if text not in found[name]["message"]] == [], found[name]
        assert found[name]["unchanged"], name
    assert len(found) == 16


def test_the_ways_out_that_the_errors_name_are_ways_out(
    bridge: RankPool, first: FirstPhases, tmp_path: Path
) -> None:
    start, _ = first(1)
    own = str(tmp_path / "own")
    ways = {
        "load_optim": Bridge(
            FIRST + 1, load=start, lr=1e-3, changes={"checkpoint.load_optim": False}
        ),
        "pretrained_checkpoint": Bridge(
            FIRST + 1, save=own, lr=1e-3, changes={"checkpoint.pretrained_checkpoint": start}
        ),
    }
    asked: dict[str, dict[str, Any]] = {
        "load_optim": {},
        "pretrained_checkpoint": {**RESET, "start": start},
    }
    for name, run in ways.items():
        (result,) = bridge.run(TRAIN, 1, run=run, resume=asked[name])
        assert result["begin"]["iteration"] == FIRST, name


def test_a_run_without_a_checkpoint_does_not_lose_its_policy(
    bridge: RankPool, tmp_path: Path
) -> None:
    run = Bridge(1, load=str(tmp_path))
    (failure,) = bridge.run(TRAIN, 1, run=run, resume=RESET, allow_failure=True)
    assert isinstance(failure, Failure)
    assert failure.type == "HostError"
    assert "no optimizer state was loaded" in failure.message


def test_the_directory_is_chosen_and_nothing_else(
    bridge: RankPool, first: FirstPhases, tmp_path: Path
) -> None:
    start, _ = first(1)
    own = str(tmp_path)
    step = {"checkpoint.ckpt_step": 7}

    def prepared(run: Bridge, **resume: Any) -> dict[str, Any]:
        (found,) = bridge.run("tests.support.bridge_calls:prepared", 1, run=run, resume=resume)
        requests.append(found.pop("request"))
        return dict(found)

    requests: list[Request] = []
    url = "msc://bucket/phase1"
    kept = {"load": url, "save": own, "ckpt_step": 7}
    assert prepared(Bridge(1, load=url, save=own, changes=step)) == kept
    begins = {"load": start, "save": own, "ckpt_step": 7}
    assert prepared(Bridge(1, save=own, changes=step), start=start) == begins
    assert prepared(Bridge(1, load=start, save=own, changes=step), start=start) == begins
    assert [r.where for r in requests] == ["load", "start", "start"]
    goes_on = {"load": start, "save": start, "ckpt_step": None}
    other = first(1, True)[0]
    assert prepared(Bridge(1, save=start, changes=step), start=other) == goes_on
    # A job may end between Bridge's tracker file and Megatron's.
    interrupted = tmp_path / "interrupted"
    interrupted.mkdir()
    (interrupted / "latest_train_state.pt").touch()
    found = prepared(Bridge(1, save=str(interrupted)), start=start)
    assert found["load"] == str(interrupted)
    asked = {"policy": ResumePolicy(reset_iteration=True), "guard": False, "verify": True}
    assert prepared(Bridge(1), report_dir="r", **asked)["load"] is None
    own_request, _, last = requests[-3:]
    assert (own_request.where, own_request.guard, own_request.verify) == ("own", True, False)
    assert last == Request(policy=asked["policy"], report_dir=Path("r"), guard=False, verify=True)


def test_an_optimizer_that_is_built_past_this_package_is_an_error(
    bridge: RankPool, first: FirstPhases
) -> None:
    start, _ = first(1)
    run = Bridge(FIRST + 1, load=start, changes={"optimizer.provide": stock_optimizer})
    (failure,) = bridge.run(TRAIN, 1, run=run, resume={}, allow_failure=True)
    assert isinstance(failure, Failure)
    assert failure.type == "HostError"
    assert "no optimizer was built with it" in failure.message
