"""Files that are made to hold a command up: one clean error, in seconds, without much memory."""

from __future__ import annotations

import os
import pickle
import resource
import struct
import time
import zipfile
from collections.abc import Callable
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.cli import main
from tests.support import specimens

#: The most that a command may take.
SECONDS, BYTES = 10.0, 1 << 30


def commands(root: Path, other: Path, out: Path) -> dict[str, list[str]]:
    return {
        **specimens.commands(root, other, out),
        "plan": ["plan", str(root), *"--lr 1e-3 --train-iters 20 --global-batch-size 8".split()],
        "convert": ["convert", str(root), str(out), "--to", "fully_reshardable"],
    }


def run_all(
    root: Path, other: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> dict[str, tuple[int, str]]:
    """Run every command; each ends with an answer or one clean error, within the bounds."""
    found = {}
    for name, words in commands(root, other, out).items():
        begin = time.process_time()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        status = main(words)
        captured = capsys.readouterr()
        told = captured.err
        assert status in (0, 1, 2), (name, told)
        # What `plan` refuses is in its answer.
        refused = status == 2 and not (name == "plan" and "REFUSED" in captured.out)
        assert refused == ("error: " in told), (name, told)
        assert "error: unexpected " not in told, (name, told)
        assert "Traceback" not in told, (name, told)
        assert len(told) < 50_000
        assert time.process_time() - begin < SECONDS, name
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown * 1024 < BYTES, name
        found[name] = (status, told)
    return found


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def call(module: str, name: str, arguments: bytes) -> bytes:
    return f"c{module}\n{name}\n".encode() + arguments + b"R"


BILLION = call("builtins", "range", b"J" + struct.pack("<i", 10**9) + b"\x85")
#: Pickled values, of protocol 2, that no run writes.
VALUES: dict[str, bytes] = {
    "a set of a range": call("builtins", "set", BILLION + b"\x85"),
    "a frozenset of a range": call("builtins", "frozenset", BILLION + b"\x85"),
    "a size of a range": call("torch", "Size", BILLION + b"\x85"),
    "an ordered dict of a range": call("collections", "OrderedDict", BILLION + b"\x85"),
    "a range": BILLION,
    "a large bytearray": call("builtins", "bytearray", b"\x8a\x05" + b"\0\0\0\0\x02" + b"\x85"),
    "a claimed size": b"\x8e" + struct.pack("<Q", 1 << 40) + b"x",
    "a claimed bytearray": b"\x96" + struct.pack("<Q", 8 << 30) + b"x",
    "a claimed frame": b"\x95" + struct.pack("<Q", 1 << 50) + b"N",
    "a claimed place in the memo": b"Nr" + struct.pack("<I", 2**32 - 1),
    "a list of lists, sixty times": b"]"
    + b"".join(
        b"q" + bytes([n]) + b"0]h" + bytes([n]) + b"ah" + bytes([n]) + b"a" for n in range(60)
    ),
    "a tuple of tuples, sixty times": b")" + b"2\x86" * 60,
    "a tuple of tuples as a key": b"}" + b")" + b"2\x86" * 60 + b"Ns",
    "a set of tuples of tuples": call("builtins", "set", b"])" + b"2\x86" * 60 + b"a\x85"),
    "an object with tuples of tuples as a key": b"}cx\ny\n" + b")" + b"2\x86" * 60 + b"\x85RNs",
    "100,000 lists": b"]" * 100_000 + b"a" * 99_999,
    "100,000 tuples": b")" + b"\x85" * 100_000,
    "100,000 tuples as a key": b"})" + b"\x85" * 100_000 + b"Ns",
    "a cycle": b"]q\x00h\x00a",
    "an integer of many digits": b"\x8b" + struct.pack("<I", 5000) + b"\x7f" * 5000,
    "a class that is changed": b"cargparse\nNamespace\nN}" + text("__repr__") + b"K\x01s\x86b",
    "a function that is changed": b"c_codecs\nencode\nN}" + text("__doc__") + b"K\x01s\x86b",
    "a foreign object": call("x", "y", b")"),
    "a tensor of an absurd shape": call(
        "torch._utils",
        "_rebuild_tensor_v2",
        b"(("
        + text("storage")
        + b"ctorch\nFloatStorage\n"
        + text("0")
        + text("cpu")
        + b"K\x01tQK\x00J\xff\xff\xff\xffJ\xff\xff\xff\x7f\x86K\x01K\x01\x86\x89}t",
    ),
}


#: Those of them that do no harm among the arguments, in the careful machine.
HARMLESS = ("a range", "a foreign object", "a claimed frame", "a claimed place in the memo")


def write_pickle(path: Path, data: bytes, compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/byteorder", b"little")
        archive.writestr("archive/data/0", b"\0" * 4)


@pytest.fixture
def roots(tmp_path: Path) -> tuple[Path, Path, Path]:
    return tmp_path / "root", tmp_path / "other", tmp_path / "new"


def place(form: str, directory: Path, data: bytes) -> None:
    """Put a pickle in the place of a form's common state, or of its index."""
    if form == ".metadata":
        (directory / ".metadata").write_bytes(data)
    else:
        write_pickle(directory / "mp_rank_00" / "model_optim_rng.pt", data)


FORMS = {"torch": "torch", ".metadata": "common.pt"}


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("form", FORMS)
def test_a_value_that_no_run_writes(
    form: str,
    name: str,
    roots: tuple[Path, Path, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    root, other, out = roots
    specimens.specimen(FORMS[form], other)
    directory = specimens.specimen(FORMS[form], root)
    place(form, directory, b"\x80\x02}" + text("args") + VALUES[name] + b"s.")
    found = run_all(root, other, out, capsys)
    if form != ".metadata" and name in HARMLESS:
        return
    assert found["inspect"][0] == 2
    where = ".metadata" if form == ".metadata" else directory.name
    assert where in found["inspect"][1]


@pytest.mark.parametrize("name", VALUES)
def test_a_large_index_with_a_value_that_no_run_writes(
    name: str, roots: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """It is read by another machine, in C, with a limit of its memory."""
    root, other, out = roots
    specimens.specimen("common.pt", other)
    directory = specimens.specimen("common.pt", root)
    if "as a key" in name or name in ("a set of tuples of tuples", "a claimed bytearray"):
        pytest.skip("what C computes by itself is not bounded")
    filling = b"B" + struct.pack("<I", 2 << 20) + b"x" * (2 << 20)
    data = b"\x80\x02}" + text("a") + filling + b"s" + text("args") + VALUES[name] + b"s."
    place(".metadata", directory, data)
    assert run_all(root, other, out, capsys)["inspect"][0] == 2


GROUP: dict[Any, Any] = {"max_lr": 1e-3, "params": [], "step": 10}


def state(**changes: Any) -> dict[Any, Any]:
    groups = {"optimizer": {"optimizer": {"param_groups": [GROUP], "state": {}}}}
    return {"iteration": 10, **groups, **changes}


def with_group(**changes: Any) -> dict[Any, Any]:
    return state(optimizer={"optimizer": {"param_groups": [{**GROUP, **changes}], "state": {}}})


#: States whose parts are of another kind than any run's.
STATES: dict[str, Any] = {
    "a list": [1],
    "a number": 3,
    "keys that are no text": {**state(), 1: 2, (1, 2): 3},
    "keys of a group that are no text": with_group(**{"x": 1}) | {None: 1},
    "groups that are none": state(optimizer={"optimizer": {"param_groups": None}}),
    "groups that are a number": state(optimizer={"optimizer": {"param_groups": 3}}),
    "groups of numbers": state(optimizer={"optimizer": {"param_groups": [1, "a"]}}),
    "a state of numbers": state(optimizer={"optimizer": {"param_groups": [GROUP], "state": [1]}}),
    "an optimizer that is a list": state(optimizer=[1, 2]),
    "an infinite step": with_group(step=inf),
    "a step that is none": with_group(step=nan),
    "a negative step": with_group(step=-1),
    "a mark of numbers": with_group(megatron_ext_phase=[1]),
    "arguments that are a list": state(args=[1]),
    "a scheduler that is a list": state(opt_param_scheduler=[1]),
    "a scheduler of no numbers": state(opt_param_scheduler={"num_steps": [1], "max_lr": "x"}),
    "a scheduler with keys of numbers": state(opt_param_scheduler={1: 2}),
    "an iteration of text": state(iteration="x"),
    "a negative iteration": state(iteration=-5),
    "an iteration without end": state(iteration=inf),
    "metadata that is a list": state(content_metadata=[1]),
    "a sharding of another kind": state(content_metadata={"distrib_optim_sharding_type": [1]}),
    "hyperparameters of no kind": with_group(max_lr=[1, {"a": {}}], betas=3, eps="x", wd_mult=None),
    "hyperparameters that are not finite": with_group(max_lr=nan, min_lr=inf, wd_mult=-inf),
    "a scaler of text": state(
        optimizer={"optimizer": {"param_groups": [GROUP]}, "grad_scaler": {"scale": "x", 1: 2}}
    ),
}


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("form", ["common_state", "torch"])
def test_a_state_of_another_kind(
    form: str,
    name: str,
    roots: tuple[Path, Path, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    root, other, out = roots
    specimens.specimen(form, other)
    directory = specimens.specimen(form, root)
    specimens.write_state(form, directory, STATES[name])
    run_all(root, other, out, capsys)
    # Without the tracker's number the iteration is that in the state.
    main(["inspect", str(directory)])
    assert "error: unexpected " not in capsys.readouterr().err


def tensor(index: Any) -> Any:
    return index.state_dict_metadata["optimizer.state.exp_avg.w"]


def first_place(index: Any) -> Any:
    return next(iter(index.storage_data.values()))


def _set(find: Callable[[Any], Any], name: str, value: Any) -> Callable[[Any], None]:
    return lambda index: object.__setattr__(find(index), name, value)


#: What is changed in torch's index.
ENTRIES: dict[str, Callable[[Any], None]] = {
    "a shape of text": _set(tensor, "size", "ab"),
    "a shape of numbers that are none": _set(tensor, "size", (1.5, None)),
    "a negative shape": _set(tensor, "size", torch.Size((-8, 64))),
    "an absurd shape": _set(tensor, "size", torch.Size((1 << 40, 1 << 40))),
    "pieces that are none": _set(tensor, "chunks", None),
    "pieces of numbers": _set(tensor, "chunks", [1]),
    "properties of text": _set(tensor, "properties", "x"),
    "a file that is no text": _set(first_place, "relative_path", 3),
    "a file elsewhere": _set(first_place, "relative_path", "../../etc/passwd"),
    "a file with an absolute path": _set(first_place, "relative_path", "/dev/zero"),
    "a file of no name": _set(first_place, "relative_path", ""),
    "a file with a zero": _set(first_place, "relative_path", "a\0b"),
    "a negative offset": _set(first_place, "offset", -1),
    "an absurd offset": _set(first_place, "offset", 1 << 61),
    "an absurd length": _set(first_place, "length", 1 << 61),
    "an offset of text": _set(first_place, "offset", "x"),
    "no length": _set(first_place, "length", None),
    "keys that are numbers": lambda index: index.state_dict_metadata.update({1: tensor(index)}),
    "entries that are numbers": lambda index: index.state_dict_metadata.update({"a": 1}),
    "places that are numbers": lambda index: index.storage_data.update({1: 2}),
    "no places": lambda index: index.storage_data.clear(),
    "no entries": lambda index: index.state_dict_metadata.clear(),
    "layers without end": lambda index: index.state_dict_metadata.update(
        {"decoder.layers.w": _layers(index, 1 << 50)}
    ),
}


def _layers(index: Any, number: int) -> Any:
    made = pickle.loads(pickle.dumps(tensor(index)))
    made.size = torch.Size((number, 1))
    made.chunks = []
    return made


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_of_an_index_that_torch_does_not_write(
    name: str, roots: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    root, other, out = roots
    specimens.specimen("common_state", other)
    path = specimens.specimen("common_state", root) / ".metadata"
    index = pickle.loads(path.read_bytes())
    ENTRIES[name](index)
    path.write_bytes(pickle.dumps(index))
    assert run_all(root, other, out, capsys)["diff --moments"][0] == 2


def fifo(path: Path) -> None:
    os.mkfifo(path)


def to_zero(path: Path) -> None:
    path.symlink_to("/dev/zero")


def to_itself(path: Path) -> None:
    path.symlink_to(path.name)


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


def bomb(path: Path) -> None:
    write_pickle(path, b"\0" * (1 << 29), zipfile.ZIP_DEFLATED)


def deflated(path: Path) -> None:
    write_pickle(path, pickle.dumps(state(), 2), zipfile.ZIP_DEFLATED)


FILES = {
    ".metadata": ("common_state", ".metadata"),
    "metadata.json": ("common.pt", "metadata.json"),
    "common.pt": ("common.pt", "common.pt"),
    "tracker": ("common.pt", "../latest_checkpointed_iteration.txt"),
    "a store's file": ("common_state", specimens.STATE_FILE),
    "tensors": ("common.pt", specimens.TENSOR_FILE),
    "model_optim_rng.pt": ("torch", "mp_rank_00/model_optim_rng.pt"),
    "distrib_optim.pt": ("torch", "mp_rank_00/distrib_optim.pt"),
}


@pytest.mark.parametrize("kind", [fifo, to_zero, to_itself, sparse, bomb, deflated])
@pytest.mark.parametrize("file", FILES)
def test_a_file_of_another_kind(
    file: str,
    kind: Callable[[Path], None],
    roots: tuple[Path, Path, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    root, other, out = roots
    form, name = FILES[file]
    if kind is sparse and file == "tensors":
        pytest.skip("edit would copy it")
    specimens.specimen(form, other)
    path = specimens.specimen(form, root) / name
    path.unlink()
    kind(path)
    found = run_all(root, other, out, capsys)
    if not (kind in (deflated, bomb, sparse) and file in ("distrib_optim.pt", "tensors")):
        assert found["inspect"][0] == 2


@pytest.mark.parametrize(
    "content", ["1" * (1 << 22), "9" * 30, "\0" * 100, "[" * 100_000, "٣", "-1"]
)
@pytest.mark.parametrize("file", ["tracker", "metadata.json"])
def test_a_text_that_no_run_writes(
    file: str, content: str, roots: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    root, other, out = roots
    form, name = FILES[file]
    specimens.specimen(form, other)
    (specimens.specimen(form, root) / name).write_text(content)
    assert run_all(root, other, out, capsys)["inspect"][0] == 2


@pytest.mark.parametrize("name", ["iter_", "iter_abc", "iter_" + "9" * 200, "mp_rank_" + "9" * 200])
def test_a_directory_of_a_strange_name(
    name: str, roots: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    root, other, out = roots
    specimens.specimen("torch", other)
    directory = specimens.specimen("torch", root)
    (root / name).mkdir()
    (directory / name).mkdir()
    run_all(root, other, out, capsys)
    (root / "latest_checkpointed_iteration.txt").unlink()
    assert run_all(root, other, out, capsys)["inspect"][0] == 2
