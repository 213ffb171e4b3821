"""The report of a real run: its files, and what Megatron's TensorBoard and W&B writers get."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.cli import main
from megatron_ext.report import plots
from megatron_ext.report.page import html_page
from megatron_ext.report.scalars import scalars
from tests.support.runs import Runs, Scenario, needs_training, ok, runs_of
from tests.support.training import Zygote

pytestmark = [pytest.mark.e2e, needs_training]

FORMAT = "--bf16 --use-distributed-optimizer --ckpt-format torch_dist"
PHASE_1 = f"--lr 3e-4 --min-lr 3e-5 --train-iters 10 --lr-decay-iters 40 {FORMAT}"
PHASE_2 = (
    f"--lr 3e-5 --min-lr 2e-5 --train-iters 14 --lr-decay-iters 40 {FORMAT} "
    "--optimizer-class megatron_ext.SelectiveAdam --selective-report {report} "
    "--selective-preset gradient-scale 0.5 "
    "--selective-rule embedding.word_embeddings.weight[64:] reset reset"
)

SCENARIOS = {
    "phase 1": Scenario(PHASE_1, saves=True, world=2),
    "phase 2": Scenario(
        f"{PHASE_2} --tensorboard-dir {{phase 2}}-events --wandb-project resumes "
        "--wandb-exp-name phase2 --wandb-save-dir {phase 2}-wandb",
        "phase 1",
        world=2,
        env={"WANDB_MODE": "offline", "WANDB_SILENT": "true"},
    ),
    "broken": Scenario(
        f"{PHASE_2} --tensorboard-dir {{broken}}-events",
        "phase 1",
        script="tests/support/broken_script.py",
    ),
}


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, zygote: Zygote
) -> Iterator[Runs]:
    yield from runs_of(SCENARIOS, request, tmp_path_factory.mktemp("runs"), zygote)


def directory(runs: Runs, name: str) -> Path:
    return runs.checkpoint(name).parent / "report"


def without_counts(lines: list[str]) -> list[str]:
    """Log lines without what each rank counts for itself."""
    return [re.sub(r"\d+ parameters on rank \d+", "parameters", line) for line in lines]


@pytest.mark.reads("phase 2")
def test_the_directory_holds_json_and_text(runs: Runs) -> None:
    found = ok(runs["phase 2"])
    files = {p.name: p.read_text() for p in directory(runs, "phase 2").iterdir()}
    stems, suffixes = ("resume-report", "transition-report-10"), (".json", ".txt")
    assert set(files) == {f"{stem}{suffix}" for stem in stems for suffix in suffixes}
    for suffix in suffixes:
        assert files[f"resume-report{suffix}"] == files[f"transition-report-10{suffix}"]
    lines = files["resume-report.txt"].splitlines()
    assert [line for line in lines if line not in found.ranks[0]] == []
    assert len(lines) > 10
    (told,) = (x for x in found.ranks[0].splitlines() if "resume report written to" in x)
    assert all(name in told for name in files)
    assert told.endswith(f"; page: python -m megatron_ext report {directory(runs, 'phase 2')}")


@pytest.mark.reads("phase 2")
def test_the_command_of_the_log_makes_the_page(runs: Runs, tmp_path: Path) -> None:
    found = ok(runs["phase 2"])
    (told,) = re.findall(r"page: (.*)", found.ranks[0])
    words = shlex.split(told)
    assert words[:4] == ["python", "-m", "megatron_ext", "report"]
    reports = shutil.copytree(words[4], tmp_path / "reports")
    assert main(["report", str(reports)]) == 0
    for stem in ("resume-report", "transition-report-10"):
        page = (reports / f"{stem}.html").read_text()
        assert page.count("<svg") == 2
        assert html_page(found.report, plots.draw(found.report)) + "\n" == page


@pytest.mark.reads("phase 2")
def test_the_curve_is_what_the_run_logged(runs: Runs) -> None:
    found = ok(runs["phase 2"])
    curves = plots.curves_of(found.report)
    new = next(c for c in curves if c.phase == 2)
    (first, *_) = found.report["scheduler"]["first_step"]
    at = dict(zip(new.iterations, new.lr, strict=True))
    assert at[10] == pytest.approx(first["lr"])
    # Megatron logs what the step after it will use.
    logged = {iteration: lr for iteration, (_, lr, _) in found.iterations.items()}
    assert sorted(logged) == [11, 12, 13, 14]
    assert [at[i] for i in logged] == pytest.approx(list(logged.values()), rel=1e-5)
    old = next(c for c in curves if c.phase == 1)
    assert (old.iterations[-1], old.lr[0]) == (10, pytest.approx(3e-4))
    assert old.lr[-1] == pytest.approx(3e-5 + 27e-5 * 30 / 40)


@pytest.mark.reads("phase 2")
def test_a_rule_names_the_parameters_it_met_on_any_rank(runs: Runs) -> None:
    rule, preset = ok(runs["phase 2"]).report["optimizers"][0]["moments"]["rules"]
    assert rule["elements"] == 64 * 32
    assert rule["examples"] == ["embedding.word_embeddings.weight"]
    assert preset["examples"] == []


@pytest.mark.reads("phase 2")
def test_tensorboard_has_the_reports_numbers_and_the_plan(runs: Runs) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = ok(runs["phase 2"])
    events = EventAccumulator(f"{runs.checkpoint('phase 2')}-events")
    events.Reload()
    names = {tag for tag in events.Tags()["scalars"] if tag.startswith("megatron_ext/")}
    # Rank 0 wrote the JSON, rank 1 has the writer.
    expected = scalars(found.report)
    assert names == set(expected)
    for name, value in expected.items():
        (event,) = events.Scalars(name)
        assert (event.step, event.value) == (10, pytest.approx(value, rel=1e-6)), name
    for name, value in {
        "counter/iteration": 10,
        "counter/consumed_train_samples": 80,
        "optimizer_0/step": 10,
        "optimizer_0/group_0/max_lr": 3e-5,
        "optimizer_0/group_0/min_lr": 2e-5,
        "optimizer_0/group_0/lr": 2e-5 + 1e-5 * 30 / 40,
        "optimizer_0/group_0/eps": 0.5e-8,
    }.items():
        (event,) = events.Scalars(f"megatron_ext/{name}")
        assert event.value == pytest.approx(value, rel=1e-6), name
    (text,) = events.Tensors("megatron_ext/plan/text_summary")
    assert text.step == 10
    lines = text.tensor_proto.string_val[0].decode().split("\n")
    assert all(line.startswith("    ") for line in lines)
    written = (directory(runs, "phase 2") / "resume-report.txt").read_text().splitlines()
    assert without_counts([line[4:] for line in lines]) == without_counts(written)
    assert any("parameters on rank 1;" in line for line in lines)
    assert (
        f"megatron_ext: {len(expected)} scalars and the plan written to TensorBoard"
        in (found.ranks[1])
    )
    assert "written to TensorBoard" not in found.ranks[0]


def wandb_records(file: Path) -> Iterator[bytes]:
    """What an offline run's file holds: LevelDB's log format after a header of 7 bytes.

    Blocks of 32 KiB; each piece of a record has a checksum, a length, and whether it is whole (1),
    the first (2), a middle (3) or the last one (4).
    """
    data, at, record = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


def wandb_history(file: Path) -> list[dict[str, Any]]:
    """The rows of an offline run."""
    from wandb.proto import wandb_internal_pb2

    rows = []
    for data in wandb_records(file):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            rows.append(
                {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json)
                    for item in record.history.item
                }
            )
    return rows


@pytest.mark.reads("phase 2")
def test_wandb_has_them_too(runs: Runs) -> None:
    found = ok(runs["phase 2"])
    saved = Path(f"{runs.checkpoint('phase 2')}-wandb")
    (file,) = saved.rglob("*.wandb")
    rows = wandb_history(file)
    expected = scalars(found.report)
    (row,) = (r for r in rows if "megatron_ext/warnings" in r)
    assert row["_step"] == 10
    assert {name: row[name] for name in expected} == pytest.approx(expected)
    assert row["megatron_ext/plan/_type"] == "html-file"
    (page,) = saved.rglob("*.html")
    assert "TRANSITION APPLIED" in page.read_text()
    assert " &gt; param_group 0" in page.read_text()
    # Megatron's own rows follow.
    assert [r["_step"] for r in rows] == [10, 11, 12, 13, 14]


@pytest.mark.reads("broken")
def test_a_run_writes_its_report_without_what_makes_the_page(runs: Runs) -> None:
    found = ok(runs["broken"])
    assert found.report["phase"]["state"] == "applied"
    stems = ("resume-report", "transition-report-10")
    written = {f"{stem}{suffix}" for stem in stems for suffix in (".json", ".txt")}
    assert {p.name for p in directory(runs, "broken").iterdir()} == written
    assert "REFUSED: import of" not in found.log


@pytest.mark.reads("broken")
def test_a_run_whose_writer_refuses_goes_on(runs: Runs) -> None:
    found = ok(runs["broken"])
    assert list(found.iterations) == [11, 12, 13, 14]
    assert (
        "megatron_ext: could not write everything to TensorBoard: OSError: no space left for "
        "megatron_ext/plan"
    ) in found.log
