"""Pickles and torch.save files are read and nothing in them runs; tensors are not read."""

from __future__ import annotations

import collections
import enum
import gc
import io
import pathlib
import pickle
import sys
import types
from argparse import Namespace
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_ext.checkpoint import pickles, placeholders, torch_file


def reread(value: Any, protocol: int = 2) -> Any:
    return pickles.load(io.BytesIO(pickle.dumps(value, protocol)))


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_plain_data_comes_back(protocol: int) -> None:
    value = {
        "a": [1, 2.5, "x", b"\xff\x00", None, True, (1, 2)],
        "b": {frozenset({1}), 3},
        "n": Namespace(lr=1e-3, betas=(0.9, 0.95)),
        "o": collections.OrderedDict(a=1),
        "d": torch.bfloat16,
        "s": torch.Size([2, 3]),
        "p": pathlib.PurePosixPath("/x/y"),
        "i": [slice(0, 3), range(4), 2j, bytearray(b"x"), torch.device("cpu")],
    }
    assert reread(value, protocol) == value


@pytest.mark.parametrize("value", [np.float64(1e-3), np.float32(0.5), np.int64(7), np.bool_(True)])
def test_numpy_scalars_become_numbers(value: Any) -> None:
    found = reread(value)
    assert found == value.item()
    assert type(found) is type(value.item())


def test_an_unknown_class_is_not_imported_and_keeps_its_attributes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = types.ModuleType("made_up_for_this_test")
    exec(
        "import enum\n"
        "class Kind(enum.Enum):\n    FLASH = 'flash'\n"
        "class Thing:\n    pass\n"
        "class Items(list):\n    pass\n",
        module.__dict__,
    )
    monkeypatch.setitem(sys.modules, module.__name__, module)
    thing = module.Thing()
    thing.kind, thing.name = module.Kind.FLASH, "x"
    data = pickle.dumps([thing, thing, module.Items([1, 2])])
    monkeypatch.delitem(sys.modules, module.__name__)
    first, second, items = pickles.load(io.BytesIO(data))
    assert module.__name__ not in sys.modules
    assert first is second
    assert first.placeholder_class == "made_up_for_this_test.Thing"
    assert first.name == "x"
    assert first.kind.placeholder_arguments == ("flash",)
    assert items.placeholder_items == [1, 2]
    again = pickles.load(io.BytesIO(data))[0]
    assert again == first
    assert hash(again) == hash(first)
    again.name = "y"
    assert again != first
    assert "Kind('flash')" in repr(first)


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "builtins.eval",
        "builtins.getattr",
        "builtins.__import__",
        "torch.load",
        "torch.hub.load",
        "torch.serialization.os.system",
        "subprocess.Popen",
        "megatron_ext.checkpoint.pickles.load",
        "argparse.ArgumentParser",
        "functools.partial",
    ],
)
def test_a_callable_that_is_not_harmless_is_a_placeholder(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    # protocol 4: STACK_GLOBAL, whose names may be dotted
    call = b"\x80\x04" + b"".join(
        b"\x8c" + bytes([len(s)]) + s.encode() for s in (module, attribute)
    )
    found = pickles.load(io.BytesIO(call + b"\x93\x8c\x01x\x85R."))
    assert isinstance(found, placeholders.Placeholder)
    assert (found.placeholder_class, found.placeholder_arguments) == (name, ("x",))


def test_bytes_in_another_codec_are_refused() -> None:
    with pytest.raises(pickle.UnpicklingError, match="encoding zip"):
        pickles.load(
            io.BytesIO(b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00xX\x03\x00\x00\x00zip\x86R.")
        )


STATE = {
    "step": torch.tensor(7.0),
    "common": torch.arange(5)[3],
    "half": torch.tensor(0.5, dtype=torch.bfloat16),
    "flag": torch.tensor(True),
    "lr": torch.nn.Parameter(torch.tensor(0.25, dtype=torch.float64)),
    "weight": torch.zeros(4, 3, dtype=torch.bfloat16),
    "kind": enum.Enum,
}


def test_of_tensors_only_those_without_dimensions_are_read() -> None:
    file = io.BytesIO()
    torch.save(STATE, file)
    file.seek(0)
    found = torch_file.load_torch(file)
    assert (found["step"], found["common"], found["half"]) == (7.0, 3, 0.5)
    assert (found["flag"], found["lr"]) == (True, 0.25)
    assert found["weight"].placeholder_class == "torch.Tensor"
    assert (found["weight"].shape, found["weight"].dtype) == ((4, 3), torch.bfloat16)


@pytest.mark.parametrize(
    "read", [torch_file.load_torch, torch_file.require_torch_file, torch_file.find_tensor]
)
def test_the_format_before_zip_is_refused(read: Callable[[BinaryIO], Any]) -> None:
    file = io.BytesIO()
    torch.save(STATE, file, _use_new_zipfile_serialization=False)
    file.seek(0)
    with pytest.raises(pickle.UnpicklingError, match=r"zip format .* since torch 1\.6"):
        read(file)


class Counted(io.BytesIO):
    """Counts the bytes read."""

    count = 0

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self.count += len(data)
        return data


def test_a_large_file_is_not_read() -> None:
    file = io.BytesIO()
    torch.save({"step": torch.tensor(3), "weights": [torch.zeros(1 << 20)] * 4}, file)
    counted = Counted(file.getvalue())
    assert torch_file.load_torch(counted)["step"] == 3
    assert len(file.getvalue()) > 1 << 22
    assert 0 < counted.count < 1 << 17


def test_a_torchscript_archive_is_refused_and_not_run() -> None:
    class Module(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    file = io.BytesIO()
    torch.jit.save(torch.jit.script(Module()), file)
    file.seek(0)
    found = torch_file.load_torch(file)
    assert isinstance(found, placeholders.Placeholder)


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04", b"\x80\x02K\x05.", b"not a pickle"])
def test_what_torch_did_not_save_raises(data: bytes) -> None:
    with pytest.raises(Exception, match=r"."):
        torch_file.load_torch(io.BytesIO(data))


def index_with(plans: Any, size: int = 3000, **attributes: Any) -> Metadata:
    """torch's index of some tensors; with `plans` as megatron-core 0.19 keeps them."""
    entries, places = {}, {}
    for number in range(size):
        key = f"tensor {number}"
        chunk = ChunkStorageMetadata(torch.Size((0,)), torch.Size((number,)))
        properties = TensorProperties(dtype=torch.float32)
        entries[key] = TensorStorageMetadata(properties, torch.Size((number,)), [chunk])
        places[MetadataIndex(key, chunk.offsets)] = _StorageInfo("__0_0.distcp", number, 1)
    index = Metadata(entries, storage_data=places)
    index.version = "1.0.0"
    for name, value in attributes.items():
        setattr(index, name, value)
    if plans is not None:
        index.all_local_plans = plans  # type: ignore[attr-defined]
    return index


def described(index: Any) -> Any:
    """Of an index what is looked at; indices of places are equal by themselves only."""
    places = {(i.fqn, tuple(i.offset)): p for i, p in index.storage_data.items()}
    return index.state_dict_metadata, places, index.version


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("size", [1, 3000])
def test_the_plans_in_an_index_are_left_out(protocol: int, size: int) -> None:
    plans = [{"items": [f"item {n}" for n in range(size)]}]
    data = pickle.dumps(index_with(plans, size, mcore_data={"a": {"b": 1}}), protocol)
    whole, found = pickles.load(io.BytesIO(data)), pickles.load_index(io.BytesIO(data))
    assert whole.all_local_plans == plans
    assert not hasattr(found, "all_local_plans")
    assert described(found) == described(whole)
    assert found.mcore_data == {"a": {"b": 1}}
    assert len(found.state_dict_metadata) == size
    # An older index has none.
    data = pickle.dumps(index_with(None, size), protocol)
    assert described(pickles.load_index(io.BytesIO(data))) == described(whole)


def test_reading_an_index_leaves_no_garbage() -> None:
    gc.collect()
    with pickles.gc_disabled():
        found = pickles.load_index(io.BytesIO(pickle.dumps(index_with([1, 2]), 4)))
        left = [o for o in gc.get_objects() if isinstance(o, pickles._Inert)]
    assert found.storage_data
    assert not left


@pytest.mark.parametrize("protocol", [2, 4])
def test_the_name_may_be_that_of_something_else(protocol: int) -> None:
    index = index_with([1, 2])
    index.state_dict_metadata["all_local_plans"] = index.state_dict_metadata["tensor 7"]
    data = pickle.dumps(index, protocol)
    found = pickles.load_index(io.BytesIO(data))
    assert "all_local_plans" in found.state_dict_metadata
    assert described(found) == described(pickles.load(io.BytesIO(data)))


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("lost", [1, 2, 100, 20_000, 100_000])
def test_a_truncated_index_is_none_wherever_it_ends(protocol: int, lost: int) -> None:
    data = pickle.dumps(index_with([f"item {n}" for n in range(10_000)]), protocol)
    assert lost < len(data)
    with pytest.raises(Exception, match=r"truncated|Ran out of input|exhausted"):
        pickles.load_index(io.BytesIO(data[:-lost]))
