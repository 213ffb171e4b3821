"""A checkpoint file that one rank cannot read is one error on every rank, which names it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ext.checkpoint.stored import open_checkpoint
from tests.conftest import Checkpoints
from tests.resume.test_resume import SECOND
from tests.support import flips
from tests.support.cells import chosen, of_every_version
from tests.support.damages import DAMAGES
from tests.support.harness import Layout
from tests.support.pool import RankPool

pytestmark = pytest.mark.ranks

FULL = Layout(format="fully_reshardable", tp=2)
LAYOUTS = {
    "dp_reshardable": Layout(),
    "fully_reshardable": FULL,
    "ranks that exchange": replace(Layout(), parallel_load=True),
}


def _index(root: Path) -> str:
    DAMAGES["truncated"](open_checkpoint(root).directory / ".metadata")
    return ".metadata"


def _no_file(root: Path) -> str:
    path = _tensors(root)[0].path
    path.unlink()
    return path.name


def _short_files(root: Path) -> str:
    for path in {record.path for record in _tensors(root)}:
        DAMAGES["truncated"](path)
    return "__"


def _common_state(root: Path) -> str:
    """A bit of the state common to all ranks, in the middle of its pickle."""
    (record, *_) = (r for r in _pickles(root) if not _is_group(r))
    flips.flip(record.path, record.begin + record.size // 2)
    return record.path.name


def _number(root: Path) -> str:
    """The lowest bit of a number in every pickle, which can be loaded as it is."""
    for record in _pickles(root):
        data = record.path.read_bytes()[record.begin : record.begin + record.size]
        at = data.find(b"G?")  # BINFLOAT, and the first byte of a number below 1 (pickletools)
        if at >= 0:
            flips.flip(record.path, record.begin + at + 8)
    return ""


def _pickles(root: Path) -> list[flips.Record]:
    """Those of the common state and of the param_groups."""
    return [
        r
        for r in flips.records(open_checkpoint(root).directory)
        if r.name.endswith("data.pkl") and (r.key in ("common_state/shard_0_1", "") or _is_group(r))
    ]


def _is_group(record: flips.Record) -> bool:
    return record.key.endswith("optimizer/shard_0_1")


def _bit(root: Path) -> str:
    """The lowest bit of an element of each exp_avg: training goes on with it, unnoticed."""
    for record in _tensors(root):
        if record.key.rpartition(".")[2] == "exp_avg" or ".exp_avg." in record.key:
            flips.flip(record.path, record.begin)
    return "__"


def _tensors(root: Path) -> list[flips.Record]:
    """The records of elements that every rank of these layouts reads some of."""
    return [
        r
        for r in flips.records(open_checkpoint(root).directory)
        if "/data/" in r.name and r.path.suffix == ".distcp"
    ]


#: What is wrong with the files of one rank -> whether that is found without verify=True.
FAULTS: dict[Callable[[Path], str], bool] = {
    _index: True,
    _no_file: True,
    _short_files: True,
    _common_state: True,
    _number: True,
    _bit: False,
}
CELLS = [(layout, fault, rank) for layout in LAYOUTS for fault in FAULTS for rank in (0, 1)]
SOME = [("dp_reshardable", _short_files, 1), ("fully_reshardable", _common_state, 0)]
DEFAULT = [
    ("dp_reshardable", _index, 0),
    ("dp_reshardable", _no_file, 0),
    ("ranks that exchange", _short_files, 1),
    ("ranks that exchange", _bit, 0),
    ("fully_reshardable", _bit, 1),
    ("dp_reshardable", _bit, 1),
    ("dp_reshardable", _number, 1),
]
RAN: list[tuple[str, str, int]] = []


@pytest.mark.parametrize(("name", "fault", "faulty"), of_every_version(CELLS, SOME, DEFAULT))
def test_every_rank_stops_with_the_name_of_the_file(
    name: str,
    fault: Callable[[Path], str],
    faulty: int,
    ext: RankPool,
    checkpoints: Checkpoints,
    tmp_path: Path,
) -> None:
    layout = LAYOUTS[name]
    source, _ = checkpoints.phase_1(replace(layout, parallel_load=False), 2)
    damaged = tmp_path / "damaged"
    shutil.copytree(source, damaged)
    file = fault(damaged)
    directories = [str(damaged) if rank == faulty else source for rank in range(2)]
    case = "tests.support.faults:in_files"
    arguments = {"layout": layout, "hyper": SECOND, "directories": directories}
    if not FAULTS[fault]:
        assert [r["type"] for r in ext.run(case, 2, timeout=80, **arguments)] == ["", ""]
    results = ext.run(case, 2, timeout=80, **arguments, verify=not FAULTS[fault])
    wanted = {faulty: "CheckpointError", 1 - faulty: "AgreementError"}
    for rank, result in enumerate(results):
        assert result["type"] == wanted[rank], result["message"]
        assert str(damaged / file) in result["message"]
        assert "restore it, or load another iteration" in result["message"]
        assert result["unchanged"]  # its param_groups: the others' tensors are read by then
        assert result["collectives_work"]
    RAN.append((name, fault.__name__, faulty))


def test_every_cell_ran(request: pytest.FixtureRequest) -> None:
    assert len(CELLS) == 3 * 6 * 2
    assert len(RAN) == len(set(RAN))
    assert len(RAN) == chosen(request, test_every_rank_stops_with_the_name_of_the_file)
