"""Moments that Adam cannot use, loaded or made by a rule, are told before the first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import FIRST, Checkpoints
from tests.support.harness import Layout
from tests.support.pool import RankPool

pytestmark = pytest.mark.ranks

BF16 = Layout()
EVERYTHING = "moments: [{match: '*', exp_avg: %s, exp_avg_sq: %s}]"
#: What makes the large element overflow: the policy, and what the error names.
OVERFLOWS = {
    "scaled in one pass": (EVERYTHING % ("keep", "scale 1e+20"), "scale 1e+20"),
    "scaled after a look": (EVERYTHING % ("reset", "scale 1e+20"), "scale 1e+20"),
    "preset": ("preset: gradient-scale 1e+15", "preset gradient-scale 1e+15"),
}


def tampered(
    stock: RankPool, checkpoints: Checkpoints, target: Path, value: float
) -> dict[str, Any]:
    """A checkpoint with another number in exp_avg_sq, and how it is loaded."""
    directory, _ = checkpoints.phase_1(BF16, 2)
    call: dict[str, Any] = {"layout": BF16, "hyper": FIRST}
    stock.run(
        "tests.support.policies_stock:damaged",
        2,
        directory=directory,
        target=str(target),
        changes=[("exp_avg_sq", 1, 0, value)],
        **call,
    )
    return {**call, "directory": str(target)}


def resumed(ext: RankPool, call: dict[str, Any], policy: str) -> list[dict[str, Any]]:
    found = ext.run("tests.support.policies:refused", 2, policies=[policy], **call)
    return [of_rank for (of_rank,) in found]


def unusable(found: dict[str, Any]) -> int:
    """The elements of which Adam cannot take the root or divide."""
    return sum(
        int((~np.isfinite(t["exp_avg"])).sum())
        + int((~(np.isfinite(t["exp_avg_sq"]) & (t["exp_avg_sq"] >= 0.0))).sum())
        for t in found["state"].values()
    )


@pytest.mark.parametrize("name", OVERFLOWS)
def test_what_a_rule_makes_is_judged_as_what_is_loaded(
    name: str, stock: RankPool, ext: RankPool, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    policy, rule = OVERFLOWS[name]
    call = tampered(stock, checkpoints, tmp_path / "large", 1e30)
    refused = resumed(ext, call, f"{{{policy}}}")
    assert [r["type"] for r in refused] == ["PlanError", "AgreementError"]
    for one in refused:
        assert one["in step"]
        assert ".weight: 1 of exp_avg_sq not finite" in one["message"]
        assert rule in one["message"]
        assert "--selective-nonfinite reset" in one["message"]
    for choice, left in (("reset", 0), ("keep", 1)):
        for one in resumed(ext, call, f"{{nonfinite: {choice}, {policy}}}")[:1]:
            assert unusable(one) == left
            (note,) = (x for x in one["lines"] if "1 elements of the moments" in x)
            assert "after the rules" in note
            assert {"reset": "reset to 0", "keep": "kept"}[choice] in note
            assert (" inf" in "\n".join(one["lines"])) == (choice == "keep")


@pytest.mark.parametrize("rules", ["", EVERYTHING % ("scale 0.5", "scale 0.25")])
def test_a_negative_exp_avg_sq_in_the_checkpoint_is_refused_by_name(
    rules: str, stock: RankPool, ext: RankPool, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    call = tampered(stock, checkpoints, tmp_path / "flipped", -1e-6)
    rest = f", {rules}" if rules else ""
    refused = resumed(ext, call, f"{{nonfinite: error{rest}}}")
    assert [r["type"] for r in refused] == ["CheckpointError", "AgreementError"]
    for one in refused:
        assert one["in step"]
        assert ".weight: 1 of exp_avg_sq negative" in one["message"]
    for choice, left in (("reset", 0), ("keep", 1)):
        one = resumed(ext, call, f"{{nonfinite: {choice}{rest}}}")[0]
        assert unusable(one) == left
        assert any("1 elements of the moments" in line for line in one["lines"])


def test_what_a_rule_makes_of_a_live_optimizer_is_judged_too(
    stock: RankPool, ext: RankPool, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    call = tampered(stock, checkpoints, tmp_path / "large", 1e30)
    refused = ext.run(
        "tests.support.policies:live_refused", 2, policy="preset: gradient-scale 1e+15", **call
    )
    assert [r["type"] for r in refused] == ["PlanError", "AgreementError"]
    for one in refused:
        assert "1 of exp_avg_sq not finite (preset gradient-scale 1e+15)" in one["message"]
