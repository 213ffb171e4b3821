"""State by bucket, converted: what is stored by parameter is what the run had."""

from __future__ import annotations

import hashlib
import io
import pickle
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
from megatron_ext.offline.convert import convert
from tests.conftest import FIRST
from tests.support import saving_cases
from tests.support.cells import chosen, of_every_version
from tests.support.harness import Hyper, Layout
from tests.support.pool import RankPool

TO = "fully_reshardable"
SECOND = Hyper(lr=1e-3, betas=(0.8, 0.9), train_iters=60)
BASE = Layout()
#: Layout and ranks; a layout on how many ranks in which stock then loads it.
CELLS: dict[str, tuple[Layout, int, Layout, int]] = {
    "several buckets, dp 2": (replace(BASE, overlap=True, hidden=12), 2, BASE, 1),
    "dp 3": (replace(BASE, overlap=True, hidden=12), 3, BASE, 1),
    "tp 2, gated": (replace(BASE, tp=2, gated=True), 2, replace(BASE, gated=True), 1),
    "pp 2, tied": (
        replace(BASE, pp=2, tied=True, hidden=12, vocab=60),
        2,
        replace(BASE, layers=4, tied=True),
        1,
    ),
    "experts": (
        replace(BASE, experts=4, ep=2, overlap=True, hidden=12),
        2,
        replace(BASE, experts=4, ep=2),
        2,
    ),
    "fp32": (replace(BASE, dtype="fp32"), 2, replace(BASE, dtype="fp32", tp=2), 2),
    "fp16": (replace(BASE, dtype="fp16"), 1, replace(BASE, dtype="fp16", tp=2), 2),
    "virtual stages": (replace(BASE, pp=2, vpp=2), 2, replace(BASE, layers=8), 1),
    "instances": (replace(BASE, instances=2, overlap=True), 2, BASE, 1),
    "norms that are one": (replace(BASE, qk_norm=True), 2, replace(BASE, qk_norm=True), 1),
    "frozen": (replace(BASE, trained="weight"), 2, replace(BASE, trained="weight"), 1),
}
#: In which stock's own save by parameter is right, so that it can be compared.
RIGHT = ("tp 2, gated", "fp32", "fp16", "norms that are one", "frozen")
#: Too little for bfloat16: all norms stay one, and their moments differ.
ONES = replace(FIRST, lr=1e-7, min_lr=0.0)
RAN: list[str] = []


def hyper_of(name: str) -> Hyper:
    return ONES if name == "norms that are one" else FIRST


@pytest.fixture(scope="session")
def trained(stock: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Train and save a cell once; the directory and what was saved."""
    made: dict[Any, tuple[Path, Any]] = {}

    def train(name: str, form: str = "dp_reshardable") -> tuple[Path, Any]:
        if (name, form) not in made:
            layout, world, _, _ = CELLS[name]
            path = tmp_path_factory.mktemp("trained") / "ck"
            run = dict(layout=replace(layout, format=form), hyper=hyper_of(name), steps=3)
            found = stock.run(
                "tests.support.mapped_stock:phase_1", world, **run, directory=str(path)
            )
            made[name, form] = path, found[0]
        return made[name, form]

    return train


def tensors(directory: Path) -> dict[str, np.ndarray]:
    return {
        f"{state}.{key}": value
        for state in ("param", "exp_avg", "exp_avg_sq")
        for key, value in saving_cases.stored(str(directory), state).items()
    }


@pytest.mark.ranks
@pytest.mark.parametrize("name", of_every_version(CELLS, ["several buckets, dp 2"]))
def test_what_is_loaded_is_what_the_run_had(
    name: str, trained: Any, stock: RankPool, ext: RankPool, tmp_path: Path
) -> None:
    source, saved = trained(name)
    layout, _, other, ranks = CELLS[name]
    before = contents(source)
    new = tmp_path / "new"
    done = convert(source, new, to=TO)
    assert contents(source) == before
    assert done.differing == ()
    content = {"distrib_optim_sharding_type": TO, "chained_optim_avoid_prefix": True}
    assert content.items() <= Store(new).common()["content_metadata"].items()
    # A piece is stored without the rest of its bucket.
    assert all(size < 4 * elements + 2500 for size, elements in lengths(new))
    other = replace(other, format=TO, hidden=layout.hidden, vocab=layout.vocab)
    run = dict(layout=other, hyper=hyper_of(name), directory=str(new))
    of_stock = stock.run("tests.support.mapped_stock:loaded", ranks, **run)[0]["state"]
    run = dict(layout=other, hyper=SECOND, directory=str(new), policies={"keep": "{}"})
    of_ext = ext.run("tests.support.policies:resumed", ranks, **run)[0]["keep"]["state"]
    # The last stage of a pipeline has a copy of the tied embedding.
    wanted = saved["state"].keys() - ({"output_layer.weight"} if layout.tied else set())
    for found in (of_stock, of_ext):
        assert found.keys() == wanted
        for parameter, state in found.items():
            for key, value in state.items():
                np.testing.assert_array_equal(
                    value.view(np.uint32), saved["state"][parameter][key].view(np.uint32)
                )
    if name in RIGHT:
        by_stock, _ = trained(name, TO)
        mine, theirs = tensors(new), tensors(by_stock)
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():
            np.testing.assert_array_equal(mine[key], value, err_msg=key)
        one, two = (Store(d).index.state_dict_metadata for d in (new, by_stock))
        assert one.keys() == two.keys()
        assert Store(new).common() == Store(by_stock).common()
    RAN.append(name)


@pytest.mark.ranks
def test_every_layout_was_converted(request: pytest.FixtureRequest) -> None:
    assert len(CELLS) == 11
    assert len(RAN) == len(set(RAN)) == chosen(request, test_what_is_loaded_is_what_the_run_had)


@pytest.mark.ranks
def test_stock_continues_as_from_the_original(
    trained: Any, stock: RankPool, tmp_path: Path
) -> None:
    name = "several buckets, dp 2"
    source, _ = trained(name)
    convert(source, tmp_path / "new", to=TO)
    layout, world, _, _ = CELLS[name]
    runs = [
        stock.run(
            "tests.support.old:loaded",
            world,
            layout=replace(layout, format=form),
            hyper=FIRST,
            directory=str(directory),
        )[0]
        for form, directory in (("dp_reshardable", source), (TO, tmp_path / "new"))
    ]
    assert runs[0]["losses"] == runs[1]["losses"]
    assert runs[0]["steps"] == runs[1]["steps"] == [3]


@pytest.mark.ranks
def test_the_command_converts_only_when_it_is_told_to(
    trained: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, _ = trained("several buckets, dp 2")
    assert cli.main(["convert", str(source), str(tmp_path / "new")]) == 2
    assert (
        "found dp_reshardable. There is nothing to convert: load it as it is, or convert it "
        in (capsys.readouterr().err)
    )
    assert cli.main(["convert", str(source), str(tmp_path / "new"), "--to", TO]) == 0
    said = capsys.readouterr()
    assert "reassembled 51 optimizer tensors, copied 26 tensors and objects" in said.out
    assert said.err == ""
    assert open_checkpoint(tmp_path / "new").sharding_type == TO
    assert cli.main(["convert", str(tmp_path / "new"), str(tmp_path / "no"), "--to", TO]) == 2
    assert "found fully_reshardable. There is nothing to convert" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["new"]


@pytest.mark.ranks
@pytest.mark.parametrize(
    "damage", ["edited weight", "flipped bit", "other step", "lost piece", "copy", "nothing"]
)
def test_what_does_not_fit_is_refused_by_name(damage: str, trained: Any, tmp_path: Path) -> None:
    original, saved = trained("tp 2, gated")
    source = tmp_path / "source"
    shutil.copytree(original, source)
    weight, second = "decoder.layers.mlp.linear_fc1.weight", "optimizer.distributed.dp_group_idx_1."
    bucket = second + "gbuf_idx_0.dtype_(torch.bfloat16, torch.float32).bucket_idx_0."
    name, wanted = "decoder.layers.1.mlp.linear_fc1.weight", ""
    norm = "decoder.final_layernorm.weight"
    if damage == "edited weight":
        change(source, weight, (1, 0, 0), lambda t: t[0, 3].mul_(2))
        wanted = f"the master weights of {name}: expected that they are the model's weights, "
    elif damage == "flipped bit":
        # One of 4864 master weights, and no other rank has it.
        values = saved["state"][name]["param"][[*range(16, 32), *range(48, 64)]].reshape(-1)
        change(source, bucket + "param", values, flip)
        wanted = f"the master weights of {name}: expected that they are the model's weights, "
    elif damage == "other step":
        change(source, second + "optimizer/shard_0_1", None, other_step)
        wanted = f"{second}optimizer/shard_0_1: expected what optimizer.distributed.dp_group_idx_0."
    elif damage == "lost piece":
        metadata = pickle.loads((source / ".metadata").read_bytes())
        del metadata.state_dict_metadata[bucket + "exp_avg"].chunks[5]
        (source / ".metadata").write_bytes(pickle.dumps(metadata))
        wanted = f"expected pieces of {bucket}exp_avg without a gap, found none for element 640"
    elif damage == "copy":
        values = saved["state"][norm]["exp_avg"]
        change(source, bucket + "exp_avg", values, flip)
    if wanted:
        with pytest.raises(CheckpointError) as caught:
            convert(source, tmp_path / "new", to=TO)
        assert wanted in str(caught.value)
        assert [p.name for p in tmp_path.iterdir()] == ["source"]
    else:
        done = convert(source, tmp_path / "new", to=TO)
        assert done.differing == ((norm,) if damage == "copy" else ())
        np.testing.assert_array_equal(
            tensors(tmp_path / "new")[f"exp_avg.{norm}"], saved["state"][norm]["exp_avg"]
        )


@pytest.mark.ranks
@pytest.mark.parametrize("case", ["only norms", "half frozen"])
def test_what_the_weights_do_not_tell_is_refused(
    case: str, stock: RankPool, tmp_path: Path
) -> None:
    layout, hyper = BASE, FIRST
    if case == "only norms":
        layout, hyper = replace(BASE, trained="norm.weight"), ONES
        wanted, named = "found equal weights: ", "decoder.layers.1.mlp.linear_fc1.layer_norm_weight"
    else:
        layout, wanted = replace(BASE, trained=r"layers\.1\."), "found none of "
        named = "decoder.layers.0."
    source = tmp_path / "source"
    run = dict(layout=layout, hyper=hyper, steps=3, directory=str(source))
    stock.run("tests.support.mapped_stock:phase_1", 1, **run)
    with pytest.raises(CheckpointError, match=wanted) as caught:
        convert(source, tmp_path / "new", to=TO)
    assert named in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def lengths(directory: Path) -> list[tuple[int, int]]:
    """Bytes and elements of every piece of the optimizer's state."""
    index = Store(directory).index
    return [
        (info.length, next(c.sizes for c in entry.chunks if c.offsets == place.offset).numel())
        for place, info in index.storage_data.items()
        if place.fqn.startswith("optimizer.state.")
        for entry in (index.state_dict_metadata[place.fqn],)
    ]


def flip(values: torch.Tensor) -> None:
    values.reshape(-1).view(torch.int32)[7] ^= 1 << 18


def other_step(objects: list[Any]) -> None:
    objects[0]["param_groups"][0]["step"] = 4


def change(directory: Path, key: str, where: Any, how: Any) -> None:
    """Change a stored tensor or object in place.

    `where` is the piece's offset, or the elements from whose beginning on the piece is.
    """
    done = 0
    for index, info in Store(directory).index.storage_data.items():
        if index.fqn != key:
            continue
        path = directory / info.relative_path
        data = path.read_bytes()
        piece = data[info.offset : info.offset + info.length]
        value = torch.load(io.BytesIO(piece), weights_only=False)
        if isinstance(where, np.ndarray):
            flat = value.numpy()
            if len(flat) < 16 or not np.array_equal(flat[:16], where[:16]):
                continue
        elif where is not None and tuple(index.offset) != where:
            continue
        how(value)
        out = io.BytesIO()
        torch.save(value, out)
        assert len(out.getvalue()) == len(piece)
        path.write_bytes(data[: info.offset] + out.getvalue() + data[info.offset + info.length :])
        done += 1
    assert done == 1


def contents(root: Path) -> dict[str, str]:
    return {
        str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(root.rglob("*"))
        if p.is_file()
    }
