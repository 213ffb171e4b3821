"""``python -m megatron_ext diff``: what differs, how far moments are apart, and how it fails."""

from __future__ import annotations

import json
import math
import random
import shutil
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch

from megatron_ext.checkpoint.stored import open_checkpoint
from megatron_ext.cli import main
from megatron_ext.offline import slabs
from megatron_ext.offline.comparison import compare, pair_groups
from megatron_ext.offline.inspection import inspect_checkpoint
from megatron_ext.offline.moment_scan import distances
from tests.conftest import FIRST, STEPS, Checkpoints
from tests.support import checkpoints as by_hand
from tests.support import inspected
from tests.support.cells import of_every_version
from tests.support.groups import group
from tests.support.harness import Layout
from tests.support.old_ranks import OldRanks
from tests.support.pool import RankPool

BF16 = Layout()
FULL = replace(BF16, format="fully_reshardable")

SCHEMA = jsonschema.Draft202012Validator(
    json.loads(files("megatron_ext").joinpath("schemas/diff.schema.json").read_text())
)


def diff(
    capsys: pytest.CaptureFixture[str], *words: Any
) -> tuple[int, dict[tuple[str, str], tuple[Any, Any]], dict[str, Any]]:
    """Exit status, differences by section and name, and the document of ``diff --json``."""
    status = main(["diff", *map(str, words), "--json"])
    found = json.loads(capsys.readouterr().out)
    SCHEMA.validate(found)
    changes = {(c["section"], c["name"]): (c["a"], c["b"]) for c in found["differences"]}
    assert len(changes) == len(found["differences"])
    return status, changes, found


@pytest.mark.ranks
@pytest.mark.parametrize(
    "format",
    of_every_version(["dp_reshardable", "fully_reshardable", "torch"], ["fully_reshardable"]),
)
def test_a_checkpoint_does_not_differ_from_its_copy(
    format: str, checkpoints: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory, _ = checkpoints.phase_1(replace(BF16, format=format), 2)
    shutil.copytree(directory, tmp_path / "copy")
    moments = [] if format == "torch" else ["--moments"]
    status, changes, found = diff(capsys, directory, tmp_path / "copy", *moments)
    assert (status, changes) == (0, {})
    assert all(d["distance"] == d["different"] == 0 for d in found.get("distances", []))
    assert len(found.get("distances", [])) == {"dp_reshardable": 3, "torch": 0}.get(format, 51)
    assert main(["diff", directory, str(tmp_path / "copy")]) == 0
    assert "no differences" in capsys.readouterr().out


@pytest.mark.ranks
def test_another_phase_differs_in_its_hyperparameters(
    checkpoints: Checkpoints, capsys: pytest.CaptureFixture[str]
) -> None:
    second = replace(FIRST, lr=1e-3, weight_decay=0.05, betas=(0.8, 0.9), train_iters=60)
    a, _ = checkpoints.phase_1(FULL, 2)
    b, _ = checkpoints.phase_1(FULL, 2, second)
    status, changes, _ = diff(capsys, a, b)
    assert status == 1
    lrs = {name: changes.pop(("groups", f"optimizer group {name} lr")) for name in "01"}
    assert all(one != other for one, other in lrs.values())
    expected = {
        ("scheduler", "max_lr"): (3e-3, 1e-3),
        ("scheduler", "lr_decay_steps"): (320, 480),
        ("scheduler", "wd_incr_steps"): (320, 480),
        ("scheduler", "start_wd"): (0.1, 0.05),
        ("scheduler", "end_wd"): (0.1, 0.05),
    }
    for number in "01":
        expected["groups", f"optimizer group {number} max_lr"] = (3e-3, 1e-3)
        expected["groups", f"optimizer group {number} betas"] = ([0.9, 0.95], [0.8, 0.9])
    expected["groups", "optimizer group 0 weight_decay"] = (0.1, 0.05)
    assert changes == expected


@pytest.mark.ranks
def test_formats_and_versions_differ(
    checkpoints: Checkpoints, old: OldRanks, capsys: pytest.CaptureFixture[str]
) -> None:
    a, _ = checkpoints.phase_1(BF16, 2)
    b, _ = checkpoints.phase_1(FULL, 2)
    status, changes, _ = diff(capsys, a, b)
    assert status == 1
    assert changes.pop(("checkpoint", "sharding_type")) == ("dp_reshardable", "fully_reshardable")
    assert {section for section, _ in changes} == {"moments"}
    assert len(changes) == 3
    assert main(["diff", a, b, "--moments"]) == 1
    assert "no moments have the same key and shape" in capsys.readouterr().out
    older, _ = old.write("0.18.2", FULL)
    status, changes, _ = diff(capsys, b, older)
    assert "checkpoint" not in {section for section, _ in changes}


@pytest.mark.ranks
@pytest.mark.parametrize("limit", [1 << 24, 256])
def test_distances_are_the_optimizers(
    limit: int,
    stock: RankPool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Other hyperparameters, and cut otherwise: by tensor parallelism.
    monkeypatch.setattr(slabs, "SLAB_BYTES", limit)
    states = []
    for name, tp, lr in (("a", 1, 3e-3), ("b", 2, 1e-3)):
        (written, _) = stock.run(
            "tests.support.old:written",
            2,
            layout=replace(FULL, tp=tp),
            hyper=replace(FIRST, lr=lr),
            steps=STEPS,
            directory=str(tmp_path / name),
        )
        states.append(inspected.stacked(written["state"]))
    status, _, found = diff(capsys, tmp_path / "a", tmp_path / "b", "--moments")
    assert status == 1
    assert {(d["state"], d["name"]) for d in found["distances"]} == set(states[0])
    assert len(found["distances"]) == 51
    for d in found["distances"]:
        x, y = (state[d["state"], d["name"]] for state in states)
        distance = np.linalg.norm((y - x).ravel())
        assert distance > 0
        np.testing.assert_allclose(d["distance"], distance, rtol=1e-12)
        np.testing.assert_allclose(d["relative"], distance / np.linalg.norm(x.ravel()), rtol=1e-12)
        assert (d["elements"], d["different"]) == (x.size, np.count_nonzero(x != y))


def pieces(shape: tuple[int, ...], seed: int) -> inspected.Cut:
    """A tensor cut into boxes at random places."""
    rng = random.Random(seed)
    boxes: inspected.Cut = [tuple(slice(0, n) for n in shape)]
    for _ in range(4):
        box = boxes.pop(rng.randrange(len(boxes)))
        axis = max(range(len(shape)), key=lambda i: (box[i].stop - box[i].start, i))
        at = rng.randrange(box[axis].start + 1, box[axis].stop)
        for part in (slice(box[axis].start, at), slice(at, box[axis].stop)):
            boxes.append((*box[:axis], part, *box[axis + 1 :]))
    return boxes


@pytest.mark.parametrize("seed", range(6))
def test_pieces_need_not_be_alike(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slabs, "SLAB_BYTES", 100)
    generator = torch.Generator().manual_seed(seed)
    shape, key = (6, 9, 7), "optimizer.state.exp_avg.w"
    tensors = [torch.randn(shape, generator=generator) for _ in "ab"]
    tensors[1][2] = tensors[0][2]
    stored = []
    for number, tensor in enumerate(tensors):
        # The order in memory need not be that of the dimensions.
        laid = tensor.permute(2, 0, 1).contiguous().permute(1, 2, 0) if seed % 2 else tensor
        cut = {key: pieces(shape, 2 * seed + number)}
        stored.append(open_checkpoint(inspected.store(tmp_path / str(number), {key: laid}, cut)))
    (found,) = distances(*stored)
    x, y = (t.double().numpy().ravel() for t in tensors)
    assert (found.elements, found.different) == (x.size, np.count_nonzero(x != y))
    np.testing.assert_allclose(found.distance, np.linalg.norm(y - x), rtol=1e-13)
    np.testing.assert_allclose(
        found.relative, np.linalg.norm(y - x) / np.linalg.norm(x), rtol=1e-13
    )


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("a", "b", "distance", "relative", "different"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0, 0.0, 0),
        ([0.0, 0.0], [0.0, 3.0], 3.0, INF, 1),
        ([0.0, 0.0], [0.0, -0.0], 0.0, 0.0, 0),
        ([3.0, 4.0], [3.0, np.nextafter(np.float32(4), np.float32(5))], 2**-21, 2**-21 / 5, 1),
        ([NAN, 1.0], [NAN, 1.0], 0.0, NAN, 0),
        ([INF, 1.0], [INF, 1.0], 0.0, 0.0, 0),
        ([INF, 1.0], [-INF, 1.0], INF, NAN, 1),
        ([1.0, 1.0], [NAN, 1.0], NAN, NAN, 1),
    ],
)
def test_what_is_a_distance(
    a: list[float],
    b: list[float],
    distance: float,
    relative: float,
    different: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, values in (("a", a), ("b", b)):
        inspected.store(tmp_path / name, {"optimizer.state.exp_avg.w": torch.tensor(values)})
    (found,) = distances(*(open_checkpoint(tmp_path / name) for name in "ab"))
    np.testing.assert_equal(found.distance, distance)
    np.testing.assert_equal(found.relative, relative)
    assert found.different == different
    status, changes, _ = diff(capsys, tmp_path / "a", tmp_path / "b", "--moments")
    assert (status, changes) == (int(different > 0), {})
    assert diff(capsys, tmp_path / "a", tmp_path / "b")[0] == 0


def test_only_tensors_of_the_same_shape_are_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = "optimizer.state.exp_avg."
    inspected.store(
        tmp_path / "a",
        {f"{key}w": torch.ones(4), f"{key}v": torch.ones(2), f"{key}u": torch.ones(2)},
    )
    inspected.store(tmp_path / "b", {f"{key}w": torch.zeros(4), f"{key}v": torch.ones(3)})
    status, changes, found = diff(capsys, tmp_path / "a", tmp_path / "b", "--moments")
    assert (status, [d["name"] for d in found["distances"]]) == (1, ["w"])
    assert changes == {
        ("moments", "exp_avg float32"): (
            "3 tensors by parameter, 8 elements",
            "2 tensors by parameter, 7 elements",
        )
    }


def test_groups_are_paired_as_a_resume_pairs_them() -> None:
    dense, no_decay = group(wd_mult=1.0), group(wd_mult=0.0, weight_decay=0.0)
    experts = group(is_expert_parallel=True)
    changed = [{**g, "max_lr": 1e-4, "betas": (0.8, 0.9)} for g in (no_decay, experts, dense)]
    assert pair_groups([dense, no_decay, experts], changed) == [(0, 2), (1, 0), (2, 1)]
    # Twins: what both phases share tells them apart, else their order.
    twins = [group(eps=1e-8), group(eps=1e-6)]
    assert pair_groups(twins, [group(eps=1e-6), group(eps=1e-8)]) == [(0, 1), (1, 0)]
    assert pair_groups([dense, dense], [dense, dense]) == [(0, 0), (1, 1)]
    assert pair_groups([dense, experts], [no_decay, dense]) == [(0, 1), (1, None), (None, 0)]


def test_everything_that_differs_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = by_hand.checkpoint(tmp_path / "a", 10, format="torch_dist")
    changes = {"tensor_model_parallel_size": 2, "seed": 7, "new": [1, 2]}
    b = by_hand.checkpoint(tmp_path / "b", 20, format="torch", changes=changes)
    status, found, _ = diff(capsys, a, b)
    assert status == 1
    assert {name: found["checkpoint", name] for name in ("iteration", "format")} == {
        "iteration": (10, 20),
        "format": ("torch_dist", "torch"),
    }
    assert found["checkpoint", "sharding_type"] == ("dp_reshardable", None)
    assert found["optimizers", "optimizer step"] == (10, 20)
    assert found["layout", "tp"] == found["args", "tensor_model_parallel_size"] == (1, 2)
    assert found["scheduler", "num_steps"] == (80, 160)
    assert found["counters", "consumed_train_samples"] == (80, 160)
    assert found["args", "seed"] == (1234, 7)
    assert found["args", "new"] == (None, [1, 2])
    assert main(["diff", str(a), str(b)]) == 1
    assert "num_steps" in capsys.readouterr().out


@pytest.mark.ranks
def test_chains_of_different_length_differ(
    checkpoints: Checkpoints, capsys: pytest.CaptureFixture[str]
) -> None:
    moe = Layout(experts=4, ep=2, format="fully_reshardable")
    a, b = checkpoints.phase_1(moe, 2)[0], checkpoints.phase_1(FULL, 2)[0]
    status, changes, _ = diff(capsys, a, b)
    assert status == 1
    assert changes["optimizers", "optimizer 1"] == ("1 groups", None)


@pytest.mark.parametrize("broken", ["a", "b"])
def test_an_error_names_the_one_that_cannot_be_read(
    broken: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "ab":
        inspected.store(tmp_path / name, {"optimizer.state.exp_avg.w": torch.ones(4)})
    (tmp_path / broken / "__0_0.distcp").unlink()
    words = ["diff", str(tmp_path / "a"), str(tmp_path / "b")]
    assert main(words) == main([*words, "--moments", "--json"]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.count("\n") == 2
    assert told.err.startswith(f"error: {tmp_path / broken}/__0_0.distcp: expected at least ")


def test_the_phase_is_compared_with_its_words(tmp_path: Path) -> None:
    from megatron_ext.policy.phase import Mark

    marks = [Mark("p", "s", "o", 0, (word,)) for word in ("one", "two")]
    roots = [
        by_hand.checkpoint(tmp_path / str(i), mark=mark, args=False) for i, mark in enumerate(marks)
    ]
    (change,) = compare(*map(inspect_checkpoint, roots))
    assert (change.name, change.a, change.b) == ("optimizer phase", *map(str, marks))
