"""Old optimizer state, converted: what Megatron then loads is what the old one held."""

from __future__ import annotations

import enum
import hashlib
import pickle
import shutil
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext import cli
from megatron_ext.checkpoint.state import unreadable_sharding
from megatron_ext.checkpoint.store import Store
from megatron_ext.checkpoint.stored import open_checkpoint
from megatron_ext.errors import CheckpointError
from megatron_ext.offline.convert import convert
from tests.conftest import FIRST, STEPS
from tests.support.cells import chosen
from tests.support.harness import Hyper, Layout
from tests.support.old_ranks import OldRanks, assert_same_state
from tests.support.pool import RankPool

pytestmark = pytest.mark.ranks

SECOND = Hyper(lr=1e-3, min_lr=1e-4, betas=(0.8, 0.9), eps=1e-6, train_iters=60)
OLD = Layout(format="fully_sharded_model_space")
NEW = Layout(format="fully_reshardable")
MOE = dict(experts=4)
HALF = "moments: [{match: '*', exp_avg: scale 0.5, exp_avg_sq: scale 0.25}]"

# By whom, in which layout on two ranks, and in which layouts on how many ranks it is loaded.
CELLS = {
    "0.15.3-dp2": (
        "0.15.3",
        replace(OLD, layers=3, gated=True),
        [(replace(NEW, layers=3, gated=True), 1), (replace(NEW, layers=3, gated=True), 2)],
    ),
    "0.15.3-tp2-gated": (
        "0.15.3",
        replace(OLD, tp=2, gated=True),
        [(replace(NEW, tp=2, gated=True), 2), (replace(NEW, gated=True), 2)],
    ),
    "0.15.3-moe-ep2": (
        "0.15.3",
        replace(OLD, ep=2, **MOE),
        # With expert parallel size 1 Megatron builds one optimizer, and loads no chain of two.
        [(replace(NEW, ep=2, **MOE), 2)],
    ),
    "0.14.0-dp2": (
        "0.14.0",
        replace(OLD, layers=3, hidden=24),
        [(replace(NEW, layers=3, hidden=24), 1), (replace(NEW, layers=3, hidden=24), 2)],
    ),
}
RAN: list[str] = []


@pytest.mark.parametrize("name", CELLS)
def test_what_is_loaded_is_what_the_old_megatron_held(
    name: str, old: OldRanks, stock: RankPool, ext: RankPool, tmp_path: Path
) -> None:
    version, layout, targets = CELLS[name]
    directory, saved = old.write(version, layout)
    root = Path(directory).parent
    if layout.layers == 3:
        assert split_between_ranks(Path(directory)) > 0
    before = contents(root)
    done = convert(root, tmp_path / "new")
    assert contents(root) == before
    assert (done.directory, done.iteration) == (tmp_path / "new" / f"iter_{STEPS:07d}", STEPS)
    for target, world in targets:
        run = dict(layout=target, directory=str(done.directory))
        for of_rank in stock.run("tests.support.old:loaded", world, hyper=FIRST, **run):
            assert_same_state(of_rank["state"], saved["state"])
            assert of_rank["steps"] == [STEPS]
            assert len(of_rank["losses"]) == 1
        policies = {"keep": "{}", "half": HALF}
        found = ext.run(
            "tests.support.policies:resumed", world, hyper=SECOND, policies=policies, **run
        )
        for of_rank in found:
            assert_same_state(of_rank["keep"]["state"], saved["state"])
            assert_same_state(of_rank["half"]["state"], saved["state"], 0.5, 0.25)
            assert of_rank["keep"]["steps"] == [STEPS]
            assert {g["max_lr"] for g in of_rank["keep"]["groups"]} == {SECOND.lr}
    RAN.append(name)


def test_every_cell_ran(request: pytest.FixtureRequest) -> None:
    assert len(CELLS) == 4
    assert (
        len(RAN)
        == len(set(RAN))
        == chosen(request, test_what_is_loaded_is_what_the_old_megatron_held)
    )


def test_a_checkpoint_that_was_not_converted_is_refused_by_name(
    old: OldRanks, ext: RankPool
) -> None:
    directory, _ = old.write("0.15.3", OLD)
    run = dict(layout=OLD, hyper=SECOND, directory=directory)
    for of_rank in ext.run("tests.support.policies:refused", 2, policies=["{}"], **run):
        (error,) = of_rank
        assert (error["type"], error["where"]) == ("CheckpointError", "load")
        assert "sharding fully_sharded_model_space" in error["message"]
        assert "python -m megatron_ext convert SOURCE TARGET" in error["message"]
        assert error["unchanged"]
        assert error["in step"]
    reason = unreadable_sharding(open_checkpoint(directory).sharding_type)
    assert reason is not None
    assert reason in error["message"]


def test_what_can_be_read_has_no_reason() -> None:
    for readable in ("dp_reshardable", "fully_reshardable", "dp_zero_gather_scatter", None):
        assert unreadable_sharding(readable) is None
    assert "--ckpt-format torch" in str(unreadable_sharding("fully_sharded_bucket_space"))


def test_the_command_says_what_it_wrote(
    old: OldRanks, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory, _ = old.write("0.15.3", OLD)
    # A bare directory becomes a bare directory.
    assert cli.main(["convert", directory, str(tmp_path / "new")]) == 0
    said = capsys.readouterr().out
    expected = (
        f"{tmp_path / 'new'}: reassembled 51 optimizer tensors, copied 25 tensors and objects"
    )
    assert said.startswith(expected)
    found = open_checkpoint(tmp_path / "new")
    assert (found.directory, found.sharding_type) == (tmp_path / "new", "fully_reshardable")
    assert found.tensors["optimizer.state.param.decoder.layers.mlp.linear_fc1.weight"] == (
        2,
        32,
        16,
    )
    assert cli.main(["convert", directory, str(tmp_path / "new")]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'new'} exists: choose a new directory\n"
    iteration = ["--iteration", str(STEPS), "--json"]
    source = str(Path(directory).parent)
    assert cli.main(["convert", source, str(tmp_path / "newer"), *iteration]) == 0
    assert '"reshaped": 51' in capsys.readouterr().out
    assert cli.main(["convert", source, str(tmp_path / "no"), "--iteration", "99"]) == 2
    assert "iter_0000099 does not exist" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "newer"]


def test_other_checkpoints_and_bad_targets_are_refused(old: OldRanks, tmp_path: Path) -> None:
    directory, _ = old.write("0.15.3", OLD)
    with pytest.raises(CheckpointError, match="lies in the checkpoint itself"):
        convert(directory, Path(directory) / "new")
    with pytest.raises(CheckpointError, match=r"nowhere does not exist: make it"):
        convert(directory, tmp_path / "nowhere" / "new")
    convert(directory, tmp_path / "new")
    with pytest.raises(CheckpointError, match=r"found fully_reshardable\. There is nothing to con"):
        convert(tmp_path / "new", tmp_path / "newer")
    legacy, _ = old.write("0.15.3", replace(OLD, format="torch"))
    with pytest.raises(CheckpointError, match=r"found the format torch"):
        convert(legacy, tmp_path / "newer")
    assert [p.name for p in tmp_path.iterdir()] == ["new"]


@pytest.mark.parametrize("damage", ["cut", "lost range", "lost shape", "wrong shape", "no common"])
def test_a_damaged_source_leaves_nothing_behind(damage: str, old: OldRanks, tmp_path: Path) -> None:
    directory, _ = old.write("0.15.3", OLD)
    source = tmp_path / "source"
    shutil.copytree(directory, source)
    index = source / ".metadata"
    metadata = _Unpickler.of(index)
    key = "optimizer.state.exp_avg.decoder.layers.mlp.linear_fc1.weight"
    if damage == "cut":
        largest = max(source.glob("*.distcp"), key=lambda p: p.stat().st_size)
        largest.write_bytes(largest.read_bytes()[:-100])
        wanted = f"cannot read {largest}: EOFError"
    elif damage == "lost range":
        places = metadata.storage_data
        del places[next(i for i in places if i.fqn == key)]
        wanted = " 0, 0) ends at element 0 of 512: the checkpoint is incomplete"
    elif damage == "lost shape":
        metadata.mcore_data.clear()
        wanted = "notes no nd_reformulated_orig_global_shape"
    elif damage == "wrong shape":
        metadata.mcore_data[key]["nd_reformulated_orig_global_shape"] = (2, 32, 17)
        wanted = f"{key}: (2, 1, 1, 512) is no flattened form of (2, 32, 17)"
    else:
        (source / "common.pt").write_bytes(b"PK\x03\x04")
        wanted = f"cannot read {source / 'common.pt'}"
    if damage != "cut":
        index.write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError) as caught:
        convert(source, tmp_path / "new")
    assert wanted in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("noted", ["as it is", "without the sharding", "not at all"])
def test_arguments_and_metadata_survive(
    noted: str, old: OldRanks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the checkpoint did not say how its state is cut (a library call's, mcore 0.12)."""
    module = types.ModuleType("made_up_for_this_test")
    module.Kind = enum.Enum("Kind", {"FLASH": 1}, module=module.__name__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    directory, _ = old.write("0.15.3", OLD)
    source = tmp_path / "source"
    shutil.copytree(directory, source)
    (source / "notes").mkdir()
    (source / "notes" / "a.txt").write_text("kept")
    state = torch.load(source / "common.pt", weights_only=False)
    state["args"].attention_backend = module.Kind.FLASH
    state["args"].rng = torch.arange(5)
    metadata = state.pop("content_metadata")
    if noted == "without the sharding":
        state["content_metadata"] = {"singleton_local_shards": False}
    if noted == "as it is":
        state["content_metadata"] = metadata
    torch.save(state, source / "common.pt")
    convert(source, tmp_path / "new")
    found = torch.load(tmp_path / "new" / "common.pt", weights_only=False)
    assert found["args"].attention_backend is module.Kind.FLASH
    assert torch.equal(found["args"].rng, torch.arange(5))
    assert found["opt_param_scheduler"] == state["opt_param_scheduler"]
    expected = state.get("content_metadata", {})
    new = {"distrib_optim_sharding_type": "fully_reshardable"}
    assert found["content_metadata"] == {**expected, **new}
    assert found["optimizer"]["param_state_sharding_type"] == "fully_reshardable"
    assert found["optimizer"]["optimizer"] == state["optimizer"]["optimizer"]
    assert (tmp_path / "new" / "notes" / "a.txt").read_text() == "kept"


def split_between_ranks(directory: Path) -> int:
    """How many stored ranges of flattened tensors begin inside a shard."""
    index = Store(directory).index
    return sum(
        place.offset is not None and place.fqn in index.mcore_data and place.offset[-1] > 0
        for place in index.storage_data
        if place.fqn.startswith("optimizer.state.")
    )


class _Unpickler(pickle.Unpickler):
    """Reads an old index where the old Megatron is not installed."""

    @classmethod
    def of(cls, path: Path) -> Any:
        with path.open("rb") as file:
            return cls(file).load()

    def find_class(self, module: str, name: str) -> Any:
        if name == "MCoreMetadata":
            from megatron.core.dist_checkpointing.strategies.torch import MCoreMetadata

            return MCoreMetadata
        return super().find_class(module, name)


def contents(root: Path) -> dict[str, str]:
    return {
        str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(root.rglob("*"))
        if p.is_file()
    }
