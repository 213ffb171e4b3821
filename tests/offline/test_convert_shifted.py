"""State that stock has stored shifted, put back: what the run had, except for what is lost."""

from __future__ import annotations

import pickle
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_ext import cli
from megatron_ext.checkpoint.store import Store
from megatron_ext.checkpoint.stored import open_checkpoint
from megatron_ext.errors import CheckpointError
from megatron_ext.offline import convert_shifted, master_proof
from megatron_ext.offline.convert import convert
from tests.conftest import FIRST, Checkpoints
from tests.offline.test_convert_buckets import change, contents, flip
from tests.support import saving_cases
from tests.support.cells import chosen, of_every_version
from tests.support.harness import Hyper, Layout
from tests.support.pool import RankPool

pytestmark = pytest.mark.ranks

TO = "fully_reshardable"
FULL = Layout(format=TO)
SMALL = replace(FULL, overlap=True, hidden=12)
LARGE = replace(FULL, overlap=True, hidden=60)
SECOND = Hyper(lr=1e-3, betas=(0.8, 0.9), train_iters=60)
#: So little that bfloat16 weights stay as they were: norms are all one, biases all zero.
TINY = replace(FIRST, lr=1e-7, min_lr=0.0)
#: Layout, ranks, hyperparameters of the run that saves.
CELLS: dict[str, tuple[Layout, int, Hyper]] = {
    "dp 3": (SMALL, 3, FIRST),
    "hidden 60, dp 2": (LARGE, 2, FIRST),
    "pp 2, tied": (replace(FULL, pp=2, tied=True, hidden=12, vocab=60), 2, FIRST),
    "experts": (replace(SMALL, experts=4, ep=2), 2, FIRST),
    "tp 2, gated": (replace(SMALL, tp=2, gated=True), 2, FIRST),
    "fp32": (replace(SMALL, dtype="fp32"), 2, FIRST),
    "equal weights": (LARGE, 2, TINY),
    "virtual stages": (replace(SMALL, pp=2, vpp=2), 2, FIRST),
    "parallel save": (replace(LARGE, tp=2), 4, FIRST),
}
#: Where a run with which layout, on how many ranks, loads the copy.
LOADED: dict[str, tuple[Layout, int]] = {
    "dp 3": (replace(FULL, hidden=12), 1),
    "pp 2, tied": (replace(FULL, layers=4, tied=True, hidden=12, vocab=60), 1),
    "experts": (replace(FULL, experts=4, ep=2, hidden=12), 2),
}
#: How many ranks have written state of the optimizer, where it is not one.
BY_SEVERAL = dict.fromkeys(("pp 2, tied", "experts", "tp 2, gated", "virtual stages"), 2)
BY_SEVERAL["parallel save"] = 4
KINDS = ("param", "exp_avg", "exp_avg_sq")
RAN: list[str] = []


@pytest.fixture(scope="module")
def saved(stock: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Train and save a cell once; the directory, what the run had, and what is lost."""
    made: dict[str, tuple[Path, Any]] = {}

    def save(name: str) -> tuple[Path, Any]:
        if name not in made:
            layout, world, hyper = CELLS[name]
            path = tmp_path_factory.mktemp("shifted") / "ck"
            args: dict[str, Any] = {"transformer_impl": "local"}
            parallel = name == "parallel save"
            if parallel:
                args |= dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=1)
                args |= dict(world_size=world, expert_model_parallel_size=1)
            run = dict(layout=layout, hyper=hyper, steps=3, directory=str(path))
            found = stock.run(
                "tests.support.shifted_stock:phase_1",
                world,
                **run,
                args=args,
                parallel_save=parallel,
            )
            made[name] = path, found[0]
        return made[name]

    return save


def wanted(found: Any, layout: Layout) -> dict[str, dict[str, np.ndarray]]:
    """The state of the run; where it is lost, no moments, and the weights as master weights."""
    out = {}
    for name, state in found["state"].items():
        if layout.tied and name == "output_layer.weight":
            continue  # the last stage's copy
        lost = found["lost"][name]
        out[name] = {k: np.where(lost, np.float32(0), v) for k, v in state.items()}
        out[name]["param"] = np.where(lost, found["weights"][name], state["param"])
    return out


def is_stored(directory: Path, state: dict[str, dict[str, np.ndarray]]) -> bool:
    """Whether a checkpoint stores this state, bit for bit."""
    tensors = {kind: saving_cases.stored(str(directory), kind) for kind in KINDS}
    same = True
    for name, values in state.items():
        for kind in KINDS:
            value = of_parameter(tensors[kind], name)
            wanted = values[kind]
            assert value.size == wanted.size
            same &= np.array_equal(
                value.reshape(-1).view(np.uint32), wanted.reshape(-1).view(np.uint32)
            )
    return same


def of_parameter(tensors: dict[str, np.ndarray], name: str) -> np.ndarray:
    """The part of a stored tensor that is a parameter's."""
    lead = tuple(map(int, re.findall(r"(?:layers|local_experts)\.(\d+)\.", name)))
    key = re.sub(r"(?<=layers\.)\d+\.", "", name)
    key = re.sub(r"local_experts\.\d+\.", "experts.", key)
    if key not in tensors:
        key = key.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
        key = key.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")
    return tensors[key][lead]


def writers(directory: Path) -> set[str]:
    places = Store(directory).index.storage_data.items()
    return {
        info.relative_path.lstrip("_").split("_")[0]
        for place, info in places
        if place.fqn.startswith("optimizer.state.")
    }


@pytest.mark.parametrize("name", of_every_version(CELLS, ["dp 3"]))
def test_what_is_put_back_is_what_the_run_had(name: str, saved: Any, tmp_path: Path) -> None:
    source, found = saved(name)
    layout, _, _ = CELLS[name]
    if name == "equal weights":
        norms = [w for n, w in found["weights"].items() if n.endswith("layernorm.weight")]
        assert len(norms) == 5
        assert all((w == 1).all() for w in norms)
    assert len(writers(source)) == BY_SEVERAL.get(name, 1)
    before = contents(source)
    state = wanted(found, layout)
    assert not is_stored(source, state)
    new = tmp_path / "new"
    done = convert(source, new, to=TO)
    assert contents(source) == before
    assert is_stored(new, state)
    lost = {n: int(v.sum()) for n, v in found["lost"].items() if v.any()}
    assert dict(done.lost) == lost
    assert sum(lost.values()) > 0
    assert done.reset == ()
    assert done.differing == ()
    proof = master_proof.prove(open_checkpoint(new))
    assert proof.differences == ()
    assert proof.elements == sum(s["param"].size for s in state.values())
    RAN.append(name)


def test_every_layout_was_put_back(request: pytest.FixtureRequest) -> None:
    assert len(CELLS) == 9
    assert len(RAN) == len(set(RAN)) == chosen(request, test_what_is_put_back_is_what_the_run_had)


@pytest.mark.parametrize("name", LOADED)
def test_what_is_put_back_loads(
    name: str, saved: Any, stock: RankPool, ext: RankPool, tmp_path: Path
) -> None:
    source, found = saved(name)
    new = tmp_path / "new"
    convert(source, new, to=TO)
    layout, ranks = LOADED[name]
    state = wanted(found, layout)
    run = dict(layout=layout, hyper=FIRST, directory=str(new))
    of_stock = stock.run("tests.support.mapped_stock:loaded", ranks, **run)[0]["state"]
    run = dict(layout=layout, hyper=SECOND, directory=str(new), policies={"keep": "{}"})
    of_ext = ext.run("tests.support.policies:resumed", ranks, **run)[0]["keep"]["state"]
    for loaded in (of_stock, of_ext):
        assert loaded.keys() == state.keys()
        for parameter, values in loaded.items():
            for kind, value in values.items():
                np.testing.assert_array_equal(
                    value.view(np.uint32), state[parameter][kind].view(np.uint32), err_msg=parameter
                )


def test_a_load_and_inspect_name_the_way_out(
    saved: Any, ext: RankPool, capsys: pytest.CaptureFixture[str]
) -> None:
    source, _ = saved("dp 3")
    layout, ranks = LOADED["dp 3"]
    run = dict(layout=layout, hyper=SECOND, directory=str(source), policies=["{}"])
    ((error,),) = ext.run("tests.support.policies:refused", ranks, **run)
    command = f"python -m megatron_ext convert SOURCE TARGET --to {TO}"
    assert f"`{command}` writes a copy in which shifted state is put back" in error["message"]
    assert cli.main(["inspect", str(source), "--moments"]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert f"several buckets are padded: {command} puts them back" in said


def test_the_command_tells_what_is_lost(
    saved: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, found = saved("dp 3")
    assert cli.main(["convert", str(source), str(tmp_path / "new")]) == 2
    said = capsys.readouterr().err
    assert "If `inspect --moments` finds master weights that are not the model's" in said
    assert f"--to {TO} puts shifted state back" in said
    assert list(tmp_path.iterdir()) == []
    assert cli.main(["convert", str(source), str(tmp_path / "new"), "--to", TO]) == 0
    said = capsys.readouterr()
    assert "reassembled 51 optimizer tensors, copied 26 tensors and objects" in said.out
    lines = said.err.splitlines()
    name = "embedding.word_embeddings.weight"
    assert len(lines) == sum(v.any() for v in found["lost"].values())
    assert (
        f"warning: {found['lost'][name].sum()} elements of {name} were overwritten when it was "
        "saved: their moments are 0, their master weights the model's weights"
    ) in lines
    # What is put back is right.
    assert cli.main(["convert", str(tmp_path / "new"), str(tmp_path / "no"), "--to", TO]) == 2
    assert "There is nothing to convert: load it as it is\n" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["new"]


def test_what_is_not_certain_is_reset_by_name(
    saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As if the weights had proven two layouts, which differ in one parameter."""
    name = "decoder.layers.0.mlp.linear_fc2.weight"
    find = convert_shifted.find

    def two(*args: Any) -> Any:
        found = find(*args)
        (places,) = found.layouts
        at = [held.name for held in found.buffer].index(name)
        other = replace(places[at], shift=places[at].shift + 64)
        found.layouts.append((*places[:at], other, *places[at + 1 :]))
        return found

    monkeypatch.setattr(convert_shifted, "find", two)
    source, found = saved("dp 3")
    new = tmp_path / "new"
    assert cli.main(["convert", str(source), str(new), "--to", TO]) == 0
    said = capsys.readouterr().err
    assert "it is not certain where these parameters are stored: their moments are 0" in said
    assert f"their master weights the model's weights: {name}\n" in said
    found["lost"][name][...] = True
    assert is_stored(new, wanted(found, CELLS["dp 3"][0]))


@pytest.mark.parametrize("damage", ["edited weight", "flipped bit", "flipped zero"])
def test_what_is_wrong_in_another_way_is_refused_by_name(
    damage: str, saved: Any, tmp_path: Path
) -> None:
    original, _ = saved("dp 3")
    source = tmp_path / "source"
    shutil.copytree(original, source)
    name, elements = "embedding.word_embeddings.weight", 1
    if damage == "edited weight":
        name, elements = "decoder.layers.1.mlp.linear_fc1.weight", 12
        key = "decoder.layers.mlp.linear_fc1.weight"
        change(source, key, (1, 0, 0), lambda t: t[0, 3].mul_(2))
    elif damage == "flipped bit":
        change(source, f"optimizer.state.param.{name}", (0, 0), flip)
    else:
        # What is stored behind the end of the gathered buffer are zeros.
        change(source, f"optimizer.state.param.{name}", (0, 0), lambda t: flip(t[-1]))
    with pytest.raises(CheckpointError) as caught:
        convert(source, tmp_path / "new", to=TO)
    said = str(caught.value)
    assert f"{source}: expected master weights that are the model's weights, " in said
    assert f" Elements that differ: {name}: {elements}. The weights were edited" in said
    assert "resume with --selective-master-weights model" in said
    assert "restore the checkpoint" in said
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_edited_weights_are_no_shifted_state(stock: RankPool, tmp_path: Path) -> None:
    source = tmp_path / "source"
    run = dict(layout=FULL, hyper=FIRST, steps=3, directory=str(source))
    stock.run("tests.support.proof_stock:edited", 1, **run)
    with pytest.raises(CheckpointError) as caught:
        convert(source, tmp_path / "new", to=TO)
    said = str(caught.value)
    assert "decoder.layers.1.mlp.linear_fc1.weight: " in said
    assert "linear_proj" not in said
    assert "resume with --selective-master-weights model" in said
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_weights_that_prove_nothing_are_refused(saved: Any, tmp_path: Path) -> None:
    original, _ = saved("dp 3")
    source, key = tmp_path / "source", "decoder.final_layernorm.bias"
    shutil.copytree(original, source)
    index = pickle.loads((source / ".metadata").read_bytes())
    index.state_dict_metadata[key].properties.dtype = torch.float64
    (source / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(CheckpointError, match=rf"found {re.escape(key)}: torch.float64. Nothing"):
        convert(source, tmp_path / "new", to=TO)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_a_right_checkpoint_is_refused(checkpoints: Checkpoints, tmp_path: Path) -> None:
    source, _ = checkpoints.phase_1(FULL, 1)
    with pytest.raises(CheckpointError, match=r"There is nothing to convert: load it as it is$"):
        convert(source, tmp_path / "new", to=TO)
    assert list(tmp_path.iterdir()) == []
