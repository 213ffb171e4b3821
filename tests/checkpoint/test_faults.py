"""A part of the table of faults, and the committed whole of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.fault_table import (
    CHECKPOINTS,
    COMMANDS,
    OUTCOMES,
    PAGE,
    WRONG,
    Fault,
    Table,
    faults,
)
from tests.support.runs import needs_training
from tests.support.training import Zygote

pytestmark = [pytest.mark.e2e, needs_training]

#: Which ones, and what the run makes of them without and with --selective-verify.
TRIED = {
    Fault("dp_reshardable", "first .distcp", "a bit of a tensor", 2): ("as stock", "error"),
    Fault("dp_reshardable", "last .distcp", "a bit of a pickle"): ("error", "error"),
    Fault("fully_reshardable", "last .distcp", "another file"): ("error", "error"),
    Fault("fully_reshardable", ".metadata", "truncated"): ("error", "error"),
    Fault("legacy", "model_optim_rng.pt, rank 1", "another zip file"): ("error", "error"),
    Fault("legacy", "distrib_optim.pt, rank 1", "a bit of a tensor"): ("as stock", "error"),
}


@pytest.fixture(scope="module")
def table(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Table:
    return Table(zygote, tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("fault", TRIED, ids=lambda f: f"{f.checkpoint}-{f.file}-{f.damage}")
def test_no_fault_is_accepted_or_told_in_raw_words(fault: Fault, table: Table) -> None:
    assert fault in faults()
    table.try_one(fault)
    found = [table.outcomes[fault, command] for command in COMMANDS]
    assert not {*found} & {*WRONG}, table.told
    assert tuple(found[-2:]) == TRIED[fault]
    assert "harmless" not in found


def test_the_committed_table_is_whole_and_has_nothing_wrong() -> None:
    text = PAGE.read_text()
    counts = {o: int(n) for o, n in re.findall(r"^\| ([\w ]+) \| (\d+) \|", text, re.MULTILINE)}
    assert list(counts) == list(OUTCOMES)
    assert sum(counts.values()) == len(faults()) * len(COMMANDS)
    assert [counts[outcome] for outcome in WRONG] == [0] * len(WRONG)
    assert f"{len(faults())} faults, {len(COMMANDS)} commands" in text
    rows = {(f.checkpoint, f.file, f.damage) for f in faults()}
    assert len(re.findall(r"^\| \S.*\|$", text, re.MULTILINE)) == (
        len(rows) + len(CHECKPOINTS) + len(OUTCOMES) + 1
    )
    assert Path("docs/reference/faults.md") == PAGE.relative_to(PAGE.parents[2])
