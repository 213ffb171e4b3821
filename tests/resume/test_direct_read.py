"""Stored tensors are read in place with the same result as through torch's reader."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.planner_helpers import _create_read_item_for_tensor

from megatron_ext.checkpoint import placeholders, torch_file
from megatron_ext.resume import direct_read, store_reader


@st.composite
def parts(draw: st.DrawFn) -> tuple[list[int], list[int], list[int]]:
    shape = draw(st.lists(st.integers(1, 4), max_size=4))
    offsets = [draw(st.integers(0, n - 1)) for n in shape]
    lengths = [draw(st.integers(0, n - o)) for n, o in zip(shape, offsets, strict=True)]
    return shape, offsets, lengths


@given(parts())
def test_a_part_in_one_piece_begins_where_numpy_says(
    part: tuple[list[int], list[int], list[int]],
) -> None:
    shape, offsets, lengths = part
    whole = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    cut = whole[tuple(slice(o, o + n) for o, n in zip(offsets, lengths, strict=True))]
    stride = tuple(s // whole.itemsize for s in whole.strides)
    place = placeholders.TensorPlace(torch.float32, tuple(shape), stride, 0, whole.nbytes)
    first = direct_read.first_element(place, offsets, lengths)
    if first is None:
        assert not (cut.flags.c_contiguous and cut.size)
    else:
        assert np.array_equal(whole.ravel()[first : first + cut.size], cut.ravel())


def test_a_part_that_is_not_stored_is_left_to_torch() -> None:
    place = placeholders.TensorPlace(torch.float32, (2, 3), (3, 1), 0, 24)
    assert direct_read.first_element(place, [0, 0], [2, 3]) == 0
    assert direct_read.first_element(place, [1, 0], [1, 3]) == 3
    assert direct_read.first_element(place, [1, 0], [2, 3]) is None
    assert direct_read.first_element(place, [0], [6]) is None
    assert direct_read.first_element(place._replace(end=20), [0, 0], [2, 3]) is None
    assert direct_read.first_element(place._replace(stride=(1, 2)), [0, 0], [2, 3]) is None


@dataclass(frozen=True)
class Stored:
    """A stored tensor, what it is to fill, and whether that is done in place.

    Args:
        value: As saved.
        into: The tensor to be filled.
        part: Offsets and lengths; all of it by default.
        direct: Whether the bytes are read in place.
    """

    value: torch.Tensor
    into: Callable[[], torch.Tensor]
    part: tuple[list[int], list[int]] | None = None
    direct: bool = True


def _noise(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(shape) + sum(shape))
    return torch.randint(0, 100, shape, generator=generator).to(dtype)


def _new(*shape: int, dtype: torch.dtype = torch.float32) -> Callable[[], torch.Tensor]:
    return lambda: torch.full(shape, 77).to(dtype)


STORED = {
    "fp32": Stored(_noise(5, 7), _new(5, 7)),
    "the same again": Stored(_noise(5, 7) + 1, _new(5, 7)),
    "bf16": Stored(_noise(3, 2, dtype=torch.bfloat16), _new(3, 2, dtype=torch.bfloat16)),
    "int64": Stored(_noise(9, dtype=torch.int64), _new(9, dtype=torch.int64)),
    "bool": Stored(_noise(9, dtype=torch.int64) > 50, _new(9, dtype=torch.bool)),
    "0-dim": Stored(_noise(), _new()),
    "empty": Stored(_noise(0, 3), _new(0, 3)),
    "a parameter": Stored(_noise(6), lambda: torch.nn.Parameter(torch.zeros(6))),
    "rows": Stored(_noise(8, 3), _new(2, 3), ([5, 0], [2, 3])),
    "columns of one row": Stored(_noise(4, 6), _new(1, 3), ([2, 1], [1, 3])),
    "a view to be filled": Stored(_noise(4, 2), lambda: torch.zeros(6, 2)[1:5]),
    "columns": Stored(_noise(4, 6), _new(4, 3), ([0, 2], [4, 3]), direct=False),
    "another dtype": Stored(_noise(5), _new(5, dtype=torch.float64), direct=False),
    "a transposed target": Stored(_noise(3, 4), lambda: torch.zeros(4, 3).t(), direct=False),
    "stored transposed": Stored(_noise(4, 3).t(), _new(3, 4), direct=False),
    "complex": Stored(
        _noise(3, dtype=torch.complex64) * 1j, _new(3, dtype=torch.complex64), direct=True
    ),
    "a conjugated target": Stored(
        _noise(3, dtype=torch.complex64) * 1j,
        lambda: torch.zeros(3, dtype=torch.complex64).conj(),
        direct=False,
    ),
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("store")
    values = {name: s.value for name, s in STORED.items()}
    dcp.save({**values, "no tensor": {"a": 1}}, checkpoint_id=str(directory), no_dist=True)
    return directory


def _load(directory: Path) -> tuple[dict[str, torch.Tensor], set[str]]:
    """What is loaded, and what was left to torch's reader."""
    targets = {name: s.into() for name, s in STORED.items()}
    reader = FileSystemReader(str(directory))
    metadata = reader.read_metadata()
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    planner = DefaultLoadPlanner()
    planner.set_up_planner(targets, metadata, is_coordinator=True)
    items = []
    for name, s in STORED.items():
        offsets, lengths = s.part or ([0] * s.value.dim(), list(s.value.shape))
        items.append(
            _create_read_item_for_tensor(
                MetadataIndex(name, [0] * s.value.dim()),
                [0] * len(lengths),
                MetadataIndex(name, [0] * s.value.dim(), 0),
                offsets,
                lengths,
            )
        )
    left: list[str] = []
    original = FileSystemReader.read_data

    def read_data(self: Any, plan: Any, planner: Any) -> Any:
        left.extend(i.storage_index.fqn for i in plan.items)
        return original(self, plan, planner)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FileSystemReader, "read_data", read_data)
        with store_reader.active():
            reader.read_data(LoadPlan(items), planner).wait()
        assert FileSystemReader.read_data is read_data
    return targets, set(left)


def test_the_elements_are_those_that_were_stored(store: Path) -> None:
    targets, left = _load(store)
    for name, s in STORED.items():
        offsets, lengths = s.part or ([0] * s.value.dim(), list(s.value.shape))
        wanted = s.value[tuple(slice(o, o + n) for o, n in zip(offsets, lengths, strict=True))]
        assert torch.equal(targets[name].detach(), wanted.to(targets[name].dtype)), name
    assert left == {name for name, s in STORED.items() if not s.direct}
    assert len(left) == 5


def test_torchs_own_load_gives_the_same(store: Path) -> None:
    """Through all of torch's load, with an object among the tensors."""
    found = []
    for way in (store_reader.active, torch.no_grad):
        state = {n: s.into() for n, s in STORED.items() if s.part is None}
        with way():
            dcp.load(state, checkpoint_id=str(store), no_dist=True)
        found.append(state)
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name]), name


@pytest.mark.parametrize("left", [0.3, 0.9])
def test_a_truncated_file_is_torchs_error(left: float, store: Path, tmp_path: Path) -> None:
    for file in store.iterdir():
        content = file.read_bytes()
        if file.suffix == ".distcp":
            content = content[: int(len(content) * left)]
        (tmp_path / file.name).write_bytes(content)
    errors = []
    for way in (store_reader.active, torch.no_grad):
        state = {n: s.into() for n, s in STORED.items() if s.part is None}
        with way(), pytest.raises(BaseException) as error:  # noqa: PT011 - whatever torch raises
            dcp.load(state, checkpoint_id=str(tmp_path), no_dist=True)
        errors.append((type(error.value), str(error.value).splitlines()[0]))
    assert errors[0] == errors[1]


def test_archives_of_one_beginning_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies before the elements says all; where it differs, the archive is looked at."""
    tensors = [_noise(6, 4) + i for i in range(3)]
    others = [_noise(4, 6), _noise(6, 4, dtype=torch.int32), _noise(4, 6).t()]
    archives = []
    for tensor in (*tensors, *others):
        file = io.BytesIO()
        torch.save(tensor, file)
        archives.append(file.getvalue())
    stream = io.BytesIO(b"".join(archives))
    looked, find_tensor = [], torch_file.find_tensor
    monkeypatch.setattr(torch_file, "find_tensor", lambda f: looked.append(1) or find_tensor(f))
    places, offset = direct_read._Places(), 0
    for archive, tensor in zip(archives, (*tensors, *others), strict=True):
        place = places.find(stream, offset, len(archive))
        assert (place.shape, place.dtype) == (tuple(tensor.shape), tensor.dtype)
        assert place.stride == tuple(tensor.stride())
        data = archive[place.start : place.start + tensor.numel() * tensor.itemsize]
        assert data == tensor.t().numpy().tobytes() or data == tensor.numpy().tobytes()
        offset += len(archive)
    assert len(looked) == 1 + len(others)


def test_a_transform_is_left_to_torch(store: Path) -> None:
    reader = FileSystemReader(str(store))
    metadata = reader.read_metadata()
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    targets = {"fp32": torch.zeros(5, 7)}
    planner = DefaultLoadPlanner()
    planner.set_up_planner(targets, metadata, is_coordinator=True)
    (item,) = planner.create_local_plan().items
    assert direct_read.read_in_place(reader, [item], planner) == []
    stored = reader.storage_data[item.storage_index]
    reader.storage_data[item.storage_index] = replace(stored, transform_descriptors=["zstd"])
    assert direct_read.read_in_place(reader, [item], planner) == [item]


def test_what_comes_next_is_asked_for_once_and_without_gaps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(
        direct_read.os, "posix_fadvise", lambda fd, begin, size, advice: asked.append((begin, size))
    )
    (tmp_path / "file").write_bytes(b"")
    ends = [n * (5 << 20) for n in range(1, 30)]
    with (tmp_path / "file").open("rb") as stream:
        ahead = direct_read._Ahead(stream)
        for end in ends:
            ahead.of(end)
            begin, size = asked[-1]
            assert begin + size >= end + direct_read._AHEAD // 2
    assert len(asked) < len(ends)
    for (begin, size), (after, _) in itertools.pairwise(asked):
        assert begin + size == after
    # A stream that is no file of the kernel's.
    direct_read._Ahead(io.BytesIO()).of(1)
