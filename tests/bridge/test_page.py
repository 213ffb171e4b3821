"""The lines of the guide's page run as they are written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.bridge.conftest import FIRST, FirstPhases
from tests.support.bridge_runs import Bridge
from tests.support.pool import RankPool

pytestmark = pytest.mark.ranks

PAGE = Path(__file__).resolve().parents[2] / "docs" / "guide" / "megatron-bridge.md"


def test_the_lines_of_the_page_begin_a_phase_and_go_on(
    bridge: RankPool, first: FirstPhases, tmp_path: Path
) -> None:
    code = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)[0]
    (tmp_path / "phase1").symlink_to(first(2)[0])
    said = [
        bridge.run(
            "tests.support.bridge_calls:lines",
            2,
            code=code,
            directory=str(tmp_path),
            run=Bridge(FIRST + number),
        )[0]
        for number in (1, 2)
    ]
    assert "megatron_ext: TRANSITION APPLIED" in said[0]
    assert "max_lr: using argument value 3e-05 (checkpoint 0.01" in said[0]
    assert "megatron_ext: CONTINUED" in said[1]
    tracker = tmp_path / "phase2" / "latest_checkpointed_iteration.txt"
    assert tracker.read_text() == str(FIRST + 2)
    assert (tmp_path / "reports" / "phase2" / "resume-report.json").is_file()
