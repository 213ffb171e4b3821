"""``python -m megatron_ext inspect``: what it says of real checkpoints, and how it fails."""

from __future__ import annotations

import gc
import io
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import jsonschema
import numpy as np
import pytest
import torch
from packaging.version import Version

from benchmarks.inspect.synthetic import Moe, counts, planned
from megatron_ext.base import text
from megatron_ext.base.values import as_json
from megatron_ext.checkpoint.state_keys import parse_state_key
from megatron_ext.checkpoint.stored import open_checkpoint
from megatron_ext.cli import main
from megatron_ext.offline import slabs
from megatron_ext.offline.inspection import inspect_checkpoint
from megatron_ext.offline.moment_scan import scan
from megatron_ext.policy.phase import Mark
from tests.conftest import FIRST, STEPS, Checkpoints
from tests.support import checkpoints as by_hand
from tests.support import inspected
from tests.support.cells import of_every_version, with_all
from tests.support.harness import Layout
from tests.support.old_ranks import OldRanks
from tests.support.pool import RankPool

BF16 = Layout()
FULL = replace(BF16, format="fully_reshardable")
MOE = Layout(experts=4, ep=2)

SCHEMA = jsonschema.Draft202012Validator(
    json.loads(files("megatron_ext").joinpath("schemas/inspect.schema.json").read_text())
)

#: Layout, states, what a tensor holds, and how many optimizers the keys name.
CASES: dict[str, tuple[Layout, set[str], str, list[int | None]]] = {
    "dp_reshardable": (BF16, {"param", "exp_avg", "exp_avg_sq"}, "bucket", [None]),
    "fully_reshardable": (FULL, {"param", "exp_avg", "exp_avg_sq"}, "parameter", [None]),
    "replicated": (
        replace(BF16, distributed=False),
        {"fp32_param", "exp_avg", "exp_avg_sq"},
        "parameter",
        [None],
    ),
    "moe": (MOE, {"param", "exp_avg", "exp_avg_sq"}, "bucket", [0, 1]),
    "moe-fully_reshardable": (
        replace(MOE, format="fully_reshardable"),
        {"param", "exp_avg", "exp_avg_sq"},
        "parameter",
        [None],
    ),
}


def inspect(capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[int, dict[str, Any]]:
    """Exit status and document of ``inspect --json``."""
    status = main(["inspect", *map(str, words), "--json"])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    SCHEMA.validate(found)
    return status, found


@pytest.mark.ranks
@pytest.mark.parametrize("name", of_every_version(CASES, ["moe"]))
def test_a_real_checkpoint(
    name: str, checkpoints: Checkpoints, megatron: Version, capsys: pytest.CaptureFixture[str]
) -> None:
    layout, states, by, numbers = CASES[name]
    directory, saved = checkpoints.phase_1(layout, 2)
    status, found = inspect(capsys, directory)
    assert status == 0
    assert (found["iteration"], found["format"], found["num_steps"]) == (STEPS, "torch_dist", 32)
    assert found["sharding_type"] == (layout.format if layout.distributed else None)
    assert (found["megatron_core"], found["args"]) == (None, {"iteration": STEPS})
    assert found["written_by"] == (
        "0.19 or later: common_state in the store"
        if megatron >= Version("0.19")
        else "0.18 or earlier: common.pt beside the store"
    )
    assert found["scheduler"]["max_lr"] == FIRST.lr
    groups = [g for o in found["optimizers"] for g in o["groups"]]
    assert groups == as_json(saved[0]["groups"])
    assert [o["step"] for o in found["optimizers"]] == [STEPS] * (2 if layout.experts else 1)
    assert all(o["mark"] is None and o["grad_scaler"] is None for o in found["optimizers"])
    assert {m["state"] for m in found["moments"]} == states
    assert {m["by"] for m in found["moments"]} == {by}
    assert {m["dtype"] for m in found["moments"]} == {"float32"}
    assert {m["optimizer"] for m in found["moments"]} == set(numbers)
    assert len(found["moments"]) == 3 * len(numbers)


@pytest.mark.ranks
def test_counts_are_those_of_torchs_own_reader(checkpoints: Checkpoints) -> None:
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    directory, _ = checkpoints.phase_1(FULL, 2)
    entries = FileSystemReader(directory).read_metadata().state_dict_metadata
    for moment in inspect_checkpoint(directory).moments:
        prefix = f"optimizer.state.{moment.state}."
        mine = [e for k, e in entries.items() if k.startswith(prefix)]
        sizes = [math.prod(e.size) for e in mine]
        chunks = sum(len(e.chunks) for e in mine)
        expected = len(mine), chunks, sum(sizes), 4 * sum(sizes)
        assert (moment.tensors, moment.chunks, moment.elements, moment.size) == expected
        assert moment.tensors == 17


@pytest.mark.ranks
@pytest.mark.parametrize(
    "format", of_every_version(["dp_reshardable", "fully_reshardable", "torch"], ["torch"])
)
def test_the_grad_scaler_is_there(
    format: str, checkpoints: Checkpoints, capsys: pytest.CaptureFixture[str]
) -> None:
    layout = replace(BF16, dtype="fp16", format=format)
    _, found = inspect(capsys, checkpoints.phase_1(layout, 2)[0])
    (optimizer,) = found["optimizers"]
    assert optimizer["grad_scaler"]["scale"] in (FIRST.loss_scale, [FIRST.loss_scale])
    assert optimizer["grad_scaler"]["growth_tracker"] == STEPS


@pytest.mark.ranks
def test_legacy_says_that_there_is_no_metadata(
    checkpoints: Checkpoints, capsys: pytest.CaptureFixture[str]
) -> None:
    directory, saved = checkpoints.phase_1(replace(BF16, format="torch", tp=2), 2)
    status, found = inspect(capsys, directory)
    assert (status, found["format"], found["moments"]) == (0, "torch", [])
    assert found["layout"] == {"tp": 2, "pp": 1, "ep": 1}
    assert found["optimizers"][0]["groups"] == as_json(saved[0]["groups"])
    assert any("has no metadata of its tensors" in note for note in found["notes"])
    assert main(["inspect", directory, "--moments"]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith(f"error: {directory}: expected the format torch_dist, found torch")
    assert told.err.count("\n") == 1


#: Versions of megatron-core.
WRITERS = ("0.16.1", "0.18.2", "installed")


@pytest.mark.ranks
@pytest.mark.parametrize("version", with_all(WRITERS, {"0.16.1", "installed"}))
@pytest.mark.parametrize("layout", [FULL, replace(MOE, format="fully_reshardable")], ids=str)
def test_moments_are_the_optimizers(
    version: str,
    layout: Layout,
    old: OldRanks,
    stock: RankPool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if version == "installed":
        directory = str(tmp_path / "checkpoint")
        (written, _) = stock.run(
            "tests.support.old:written",
            2,
            layout=layout,
            hyper=FIRST,
            steps=STEPS,
            directory=directory,
        )
    else:
        directory, written = old.write(version, layout)
    status, found = inspect(capsys, directory, "--moments")
    assert status == 0
    assert found["written_by"].startswith("0.19" if version == "installed" else "0.18 or earlier")
    expected = inspected.stacked(written["state"])
    assert {(s["state"], s["name"]) for s in found["statistics"]} == set(expected)
    assert len(found["statistics"]) == 3 * (14 if layout.experts else 17)
    for s in found["statistics"]:
        values = expected[s["state"], s["name"]]
        assert (s["elements"], s["nonfinite"]) == (values.size, 0)
        assert s["largest"] == np.abs(values).max()
        np.testing.assert_allclose(s["norm"], np.linalg.norm(values.ravel()), rtol=1e-13)


@pytest.mark.ranks
@pytest.mark.parametrize("version", with_all(WRITERS, {"0.16.1", "installed"}))
@pytest.mark.parametrize("name", ["dp_reshardable", "moe"])
def test_moments_of_buckets_are_the_optimizers(
    version: str, name: str, old: OldRanks, checkpoints: Checkpoints
) -> None:
    layout = CASES[name][0]
    if version == "installed":
        directory, saved = checkpoints.phase_1(layout, 2)
        shards = [shard for of_rank in saved for shard in of_rank["shards"]]
    else:
        directory, written = old.write(version, layout)
        shards = list(written["state"].values())
    found = scan(open_checkpoint(directory))
    for state in ("param", "exp_avg", "exp_avg_sq"):
        mine = [s for s in found if s.state == state]
        values = np.concatenate([shard[state].astype(np.float64).ravel() for shard in shards])
        # Each element is on one rank only, and what is between the parameters is nobody's.
        assert sum(s.elements for s in mine) == values.size
        norm = math.hypot(*(s.norm for s in mine))
        np.testing.assert_allclose(norm, np.linalg.norm(values), rtol=1e-13)
        assert max(s.largest for s in mine) == np.abs(values).max()
        assert all("bucket_idx_" in s.name for s in mine)
        assert {s.optimizer for s in mine} == ({0, 1} if layout.experts else {None})


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("moment", "value"),
    [("exp_avg", math.nan), ("exp_avg", math.inf), ("exp_avg", -math.inf), ("exp_avg_sq", -1e-6)],
)
def test_moments_that_adam_cannot_use_are_a_warning(
    moment: str,
    value: float,
    checkpoints: Checkpoints,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    directory = tmp_path / "bad"
    shutil.copytree(checkpoints.phase_1(FULL, 2)[0], directory)
    _, before = inspect(capsys, directory, "--moments")
    inspected.poison(directory, f"optimizer.state.{moment}.output_layer.weight", value, at=3)
    assert inspect(capsys, directory)[0] == 0
    status, found = inspect(capsys, directory, "--moments")
    assert status == 1
    changed = [s for s in found["statistics"] if s not in before["statistics"]]
    ((state, name, bad),) = [(s["state"], s["name"], s["nonfinite"]) for s in changed]
    assert (state, name, bad) == (moment, "output_layer.weight", 1)
    assert math.isfinite(changed[0]["norm"])


def test_phase_counters_and_layout_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mark = Mark("cooldown", "first/iter_10", "abc", 64, ("scale exp_avg 0.5",))
    changes = {
        "tensor_model_parallel_size": 4,
        "pipeline_model_parallel_size": 2,
        "context_parallel_size": 2,
        "world_size": 64,
    }
    root = by_hand.checkpoint(tmp_path, mark=mark, format="torch_dist", changes=changes)
    _, found = inspect(capsys, root, "--iteration", 10)
    assert found["optimizers"][0]["mark"] == {
        "phase": "cooldown",
        "source": "first/iter_10",
        "operations": "abc",
        "offset": 64,
        "done": ["scale exp_avg 0.5"],
    }
    assert found["layout"] == {"tp": 4, "pp": 2, "cp": 2, "ep": 1, "dp": 4, "world": 64}
    assert found["counters"] == {"consumed_train_samples": 80}
    assert found["written_by"].startswith("0.18 or earlier")
    assert main(["inspect", str(root)]) == 0
    shown = capsys.readouterr().out
    assert "phase 'cooldown', started from first/iter_10" in shown
    assert "tp=4 pp=2 cp=2 ep=1 dp=4 world=64" in shown


def test_names_of_a_checkpoint_are_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "[red]x[/red][/oops]\x1b[2J:smile:"
    tensors = {f"optimizer.state.exp_avg.{name}": torch.ones(4)}
    common = {"opt_param_scheduler": {"num_steps": 3, "[bold]a[/]": "\x1b]0;title\x07"}}
    inspected.store(tmp_path / "a", tensors, common=common)
    assert main(["inspect", str(tmp_path / "a"), "--moments"]) == 0
    shown = capsys.readouterr().out
    assert "[red]x[/red][/oops]\\x1b[2J:smile:" in shown
    assert "[bold]a[/]" in shown
    assert "\x1b" not in shown
    assert "\x07" not in shown


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_on_stderr_of_a_terminal_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    inspected.store(tmp_path / "a", {"optimizer.state.exp_avg.w": torch.ones(4)})
    assert main(["inspect", str(tmp_path / "a"), "--moments"]) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    assert inspect(capsys, tmp_path / "a", "--moments")[0] == 0
    assert "moments" in terminal.getvalue()
    assert "16/16 bytes" in terminal.getvalue()


CUT = {
    "whole": [(slice(0, 12), slice(0, 10))],
    "rows": [(slice(0, 5), slice(0, 10)), (slice(5, 12), slice(0, 10))],
    "columns": [(slice(0, 12), slice(0, 3)), (slice(0, 12), slice(3, 10))],
    "quarters": [(slice(i, i + 6), slice(j, j + 5)) for i, j in ((0, 0), (0, 5), (6, 0), (6, 5))],
}


@pytest.mark.parametrize("cut", CUT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
def test_slabs_of_any_size_give_the_same(
    cut: str,
    dtype: torch.dtype,
    transposed: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = torch.randn(12, 10, generator=torch.Generator().manual_seed(1)).to(dtype)
    values[7, 3] = -math.inf
    tensor = values.t().contiguous().t() if transposed else values
    key = "optimizer.state.exp_avg_sq.w"
    inspected.store(tmp_path / "a", {key: tensor}, {key: CUT[cut]})
    exact = values.double().numpy()
    finite = exact[np.isfinite(exact)]
    largest: list[int] = []
    read = slabs._read_box

    def watched(file: Any, place: Any, low: Any, high: Any) -> Any:
        largest.append(slabs._span(place, low, high) * place.dtype.itemsize)
        return read(file, place, low, high)

    monkeypatch.setattr(slabs, "_read_box", watched)
    for limit in (1 << 20, 64, 8):
        largest.clear()
        monkeypatch.setattr(slabs, "SLAB_BYTES", limit)
        (found,) = scan(open_checkpoint(tmp_path / "a"))
        assert (found.elements, found.nonfinite) == (120, 1 + (finite < 0.0).sum())
        assert found.largest == np.abs(finite).max()
        np.testing.assert_allclose(found.norm, np.linalg.norm(finite), rtol=1e-13)
        assert max(largest) <= limit
        assert len(largest) >= 120 * dtype.itemsize / limit


@pytest.mark.parametrize(
    ("begins", "writers", "kept"),
    [
        # Parameters of 100, 64 and 10 elements, padding between the first two and after the last.
        ((0, 100, 128, 192, 202), (0, 0, 0, 0, 0), (0, 128, 192)),
        # A shard begins inside a parameter, at no multiple of 64, and goes on past the next.
        ((0, 96, 228), (0, 1, 1), (0, 96)),
        # ... inside a parameter that ends before the next multiple.
        ((0, 96, 100, 128), (0, 1, 1, 1), (0, 96, 128)),
        # ... inside the padding: both parts of it go.
        ((0, 90, 96, 128), (0, 0, 1, 1), (0, 128)),
    ],
)
def test_the_padding_of_a_bucket_is_no_moment(
    begins: tuple[int, ...], writers: tuple[int, ...], kept: tuple[int, ...]
) -> None:
    ends = (*begins[1:], 256)
    pieces = [
        slabs.Piece(
            "key", (begin,), (end - begin,), SimpleNamespace(relative_path=f"__{rank}_1.distcp")
        )
        for begin, end, rank in zip(begins, ends, writers, strict=True)
    ]
    found = slabs.without_padding(list(reversed(pieces)))
    assert tuple(p.offset[0] for p in found) == kept


def test_scalars_and_empty_pieces(tmp_path: Path) -> None:
    tensors = {
        "optimizer.state.exp_avg.scalar": torch.tensor(-2.0),
        "optimizer.state.exp_avg.none": torch.empty(0, 4),
    }
    inspected.store(tmp_path / "a", tensors)
    found = {s.name: (s.elements, s.norm, s.largest) for s in scan(open_checkpoint(tmp_path / "a"))}
    assert found == {"scalar": (1, 2.0, 2.0), "none": (0, 0.0, 0.0)}


def measured(tmp_path: Path, *words: Any) -> tuple[dict[str, Any], float, float]:
    """The document of a run in a process of its own, its seconds and its peak RSS in bytes."""
    code = (
        "import re, sys, time; from megatron_ext.cli import main; import torch\n"
        "begin = time.process_time(); status = main(sys.argv[1:])\n"
        # Not getrusage: its peak is at least that of the process which started this one.
        "peak = int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
        "print(time.process_time() - begin, peak * 1024, file=sys.stderr); sys.exit(status)"
    )
    command = [sys.executable, "-c", code, "inspect", *map(str, words), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, peak = map(float, done.stderr.split())
    return json.loads(done.stdout), seconds, peak


SMALL = Moe(layers=4, experts=4, hidden=64, expert_ffn=32, pipeline=2, expert=2, ranks=16)


def work_of(directory: Path) -> tuple[int, int]:
    """Calls of functions that an inspection makes, and the bytes that it holds at most."""
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    inspect_checkpoint(directory)  # what happens once, such as imports
    sys.setprofile(count)
    try:
        inspect_checkpoint(directory)
    finally:
        sys.setprofile(None)
    # When a collection comes depends on what the tests before have left.
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        inspect_checkpoint(directory)
        return calls, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        gc.enable()


@pytest.mark.parametrize("sharding", ["fully_reshardable", "dp_reshardable"])
@pytest.mark.parametrize("with_plans", [True, False])
def test_work_grows_with_the_index_and_no_faster(
    sharding: Literal["fully_reshardable", "dp_reshardable"], with_plans: bool, tmp_path: Path
) -> None:
    """A trillion parameters are a benchmark: python -m benchmarks.inspect."""
    work, pieces = [], []
    moe = SMALL
    for size in range(3):
        planned(moe, sharding).write(tmp_path / str(size), with_plans)
        found = inspect_checkpoint(tmp_path / str(size))
        assert {m.state for m in found.moments} == {"param", "exp_avg", "exp_avg_sq"}
        for m in found.moments:
            assert (m.tensors, m.chunks, m.elements, m.size) == counts(moe, sharding)
        pieces.append(found.moments[0].chunks)
        work.append(work_of(tmp_path / str(size)))
        moe = moe.twice()
    assert pieces[2] > 2.5 * pieces[0]
    for first, second, third in zip(*work, strict=True):
        # A straight line; what is quadratic would have the second step four times the first.
        assert third - second <= 2.2 * (second - first)


def test_moments_are_scanned_in_bounded_memory(tmp_path: Path) -> None:
    # 320 MB in one piece, 640 MB in float64: with torch itself (0.5 GB) over 1 GiB if it were read
    # at once.
    key = "optimizer.state.exp_avg.w"
    inspected.store(tmp_path / "a", {key: torch.ones(1 << 13, 10000)})
    found, _, peak = measured(tmp_path, tmp_path / "a", "--moments")
    assert found["statistics"][0]["norm"] == math.sqrt((1 << 13) * 10000)
    assert peak <= 1 << 30


class Evil:
    """Runs a command where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


def test_nothing_in_the_store_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    marker = tmp_path / "ran"

    def payload(_: torch.Tensor) -> bytes:
        buffer = io.BytesIO()
        torch.save(Evil(marker), buffer)
        return buffer.getvalue()

    torch.load(io.BytesIO(payload(torch.ones(1))), weights_only=False)
    assert marker.exists()
    marker.unlink()
    inspected.store(tmp_path / "a", {"optimizer.state.exp_avg.w": torch.ones(4)}, payload=payload)
    assert main(["inspect", str(tmp_path / "a"), "--moments"]) == 2
    assert "__0_0.distcp: UnpicklingError: a tensor was expected" in capsys.readouterr().err
    assert not marker.exists()


def cut_short(path: Path, share: float = 0.5) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def grown(directory: Path) -> None:
    """A place in the index where another tensor is."""
    path = directory / ".metadata"
    index = pickle.loads(path.read_bytes())
    first, second = list(index.storage_data.values())[:2]
    index.storage_data[next(iter(index.storage_data))] = second
    assert first != second
    path.write_bytes(pickle.dumps(index))


def without_place(directory: Path) -> None:
    path = directory / ".metadata"
    index = pickle.loads(path.read_bytes())
    del index.storage_data[next(iter(index.storage_data))]
    path.write_bytes(pickle.dumps(index))


def foreign(directory: Path) -> None:
    shutil.rmtree(directory)
    directory.mkdir()
    (directory / "model.safetensors").touch()


#: What is done to a checkpoint; whether --moments is needed to see it; what is said.
FAULTS: dict[str, tuple[Any, bool, str]] = {
    "truncated .metadata": (lambda d: cut_short(d / ".metadata"), False, "cannot read {0}/.metad"),
    "empty .metadata": (lambda d: cut_short(d / ".metadata", 0), False, "cannot read {0}/.metada"),
    "no .metadata": (lambda d: (d / ".metadata").unlink(), False, "without .metadata"),
    "no .distcp": (
        lambda d: (d / "__0_0.distcp").unlink(),
        False,
        "{0}/__0_0.distcp: expected at least ",
    ),
    "truncated .distcp": (
        lambda d: cut_short(d / "__0_0.distcp", 0.9),
        False,
        "{0}/__0_0.distcp: expected at least ",
    ),
    "zeroed .distcp": (
        lambda d: (d / "__0_0.distcp").write_bytes(bytes((d / "__0_0.distcp").stat().st_size)),
        True,
        "cannot read {0}/__0_0.distcp: UnpicklingError: not in the zip format",
    ),
    "another tensor's place": (grown, True, "shape (3,) where .metadata says (2, 4)"),
    "no place": (
        without_place,
        False,
        "expected a place for the piece of optimizer.state.exp_avg.",
    ),
    "no common.pt": (lambda d: (d / "common.pt").unlink(), False, "neither common.pt nor common_s"),
    "foreign directory": (foreign, False, "found model.safetensors. Check --load"),
    "no directory": (shutil.rmtree, False, "expected a checkpoint directory, found none"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("json_too", [False, True])
def test_a_damaged_checkpoint_is_one_clear_error(
    fault: str, json_too: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, needs_moments, expected = FAULTS[fault]
    tensors = {
        "optimizer.state.exp_avg.w": torch.ones(2, 4),
        "optimizer.state.exp_avg_sq.w": torch.ones(3),
    }
    directory = inspected.store(tmp_path / "a", tensors)
    words = ["inspect", str(directory), *(["--json"] if json_too else [])]
    assert main([*words, "--moments"]) == 0
    capsys.readouterr()
    damage(directory)
    if needs_moments:
        assert main(words) == 0
        capsys.readouterr()
    assert main([*words, "--moments"] if needs_moments else words) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert expected.format(directory) in told.err
    assert told.err.startswith("error: ")
    assert told.err.count("\n") == 1


def test_without_moments_there_is_nothing_to_scan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = inspected.store(tmp_path / "a", {"decoder.weight": torch.ones(2)})
    _, found = inspect(capsys, directory)
    assert found["notes"][0] == "moments: none are stored as tensors (sharding fully_reshardable)"
    assert main(["inspect", str(directory), "--moments"]) == 2
    assert (
        "expected tensors exp_avg, exp_avg_sq, momentum_buffer, moment2_buffer, param"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("optimizer.state.exp_avg.a.b", (None, "exp_avg", "a.b", False)),
        ("chained_3.optimizer.state.param.a", (3, "param", "a", False)),
        (
            "chained_1.optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_(torch.bfloat16, "
            "torch.float32).bucket_idx_0.exp_avg_sq",
            (
                1,
                "exp_avg_sq",
                "dp_group_idx_0.gbuf_idx_0.dtype_(torch.bfloat16, torch.float32).bucket_idx_0",
                True,
            ),
        ),
        ("decoder.optimizer.state.exp_avg.a", None),
        ("embedding.word_embeddings.weight", None),
    ],
)
def test_keys_are_parsed(key: str, expected: Any) -> None:
    found = parse_state_key(key)
    if expected is None:
        assert found is None
        return
    assert found is not None
    assert (found.optimizer, found.state, found.name, found.bucket) == expected


def test_json_knows_no_nan() -> None:
    value = {1: (math.nan, -math.inf), "a": torch.float32, "b": {2, 1}, (1, 2): None}
    assert as_json(value) == {
        "1": ["nan", "-inf"],
        "a": "torch.float32",
        "b": [1, 2],
        "[1, 2]": None,
    }
    assert text.printable("a\x1bé\u202e") == "a\\x1bé\\u202e"


def test_the_commands_import_neither_torch_nor_rich() -> None:
    code = (
        "import sys, megatron_ext.cli.inspect, megatron_ext.cli.diff; print([m for m in "
        "('torch', 'rich', 'megatron') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
