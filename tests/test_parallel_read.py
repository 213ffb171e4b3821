"""A file read by several threads is what ``torch.load`` reads."""

from __future__ import annotations

import math
import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext import parallel_read


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(math.prod(shape)))


def _nested() -> dict[Any, Any]:
    """As Megatron's ``distrib_optim.pt``, and what else tensors can be like."""
    whole, wide = _noise(7, 6), _noise(3 * parallel_read._BYTES_AT_A_TIME // 4 + 5)
    return {
        0: {
            torch.float32: {"param": [whole, wide], "exp_avg": [whole[2:5, 1:3], whole.t()]},
            "numel_unpadded": 5,
        },
        "buckets_coalesced": True,
        "others": (
            torch.tensor(3.0),
            torch.empty(0),
            torch.arange(9, dtype=torch.int64)[3:],
            _noise(11).bfloat16(),
            _noise(12).half(),
            None,
            "text",
            0.1,
        ),
    }


def _same(found: Any, wanted: Any) -> int:
    """Assert that two states are equal bit for bit; returns the number of tensors."""
    assert type(found) is type(wanted)
    if isinstance(wanted, torch.Tensor):
        assert (found.dtype, found.device, found.stride()) == (
            wanted.dtype,
            wanted.device,
            wanted.stride(),
        )
        assert found.requires_grad == wanted.requires_grad
        assert torch.equal(found, wanted)
        return 1
    if isinstance(wanted, dict):
        assert list(found) == list(wanted)
        return sum(_same(found[key], wanted[key]) for key in wanted)
    if isinstance(wanted, list | tuple):
        return sum(_same(x, y) for x, y in zip(found, wanted, strict=True))
    assert found == wanted
    return 0


def _asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Where each call of ``torch.load`` is to put what it reads."""
    original, places = torch.load, []

    def load(*args: Any, **kwargs: Any) -> Any:
        places.append(kwargs.get("map_location"))
        return original(*args, **kwargs)

    monkeypatch.setattr(torch, "load", load)
    return places


def test_what_is_read_by_threads_is_what_torch_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.pt"
    torch.save(_nested(), path)
    wanted = torch.load(path)
    asked = _asked(monkeypatch)
    found = parallel_read.load(str(path))
    assert asked == ["meta"]
    assert _same(found, wanted) == 9
    # Two tensors of one storage still are.
    of_first, of_second = found[0][torch.float32]["param"][0], found[0][torch.float32]["exp_avg"][0]
    of_first[2, 1] = 123.0
    assert of_second[0, 0] == 123.0


@pytest.mark.parametrize(
    "value",
    [
        OrderedDict(a=torch.ones(3)),
        {"a": torch.nn.Parameter(torch.ones(3))},
        {"a": torch.eye(3).to_sparse()},
        {"a": 1j},
    ],
    ids=["another mapping", "a parameter", "sparse", "a complex number"],
)
def test_everything_else_is_left_to_torch(
    value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.pt"
    torch.save(value, path)
    asked = _asked(monkeypatch)
    found = parallel_read.load(str(path))
    assert asked == ["meta", "cpu"]
    assert type(found) is type(value)
    assert str(found) == str(value)


def test_the_format_before_zip_is_left_to_torch(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    torch.save(_nested(), path, _use_new_zipfile_serialization=False)
    assert _same(parallel_read.load(str(path)), torch.load(path)) == 9


def test_a_file_that_cannot_be_read_has_the_error_of_torch(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    torch.save(_nested(), path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(RuntimeError, match="PytorchStreamReader"):
        parallel_read.load(str(path))
    with pytest.raises(FileNotFoundError):
        parallel_read.load(str(tmp_path / "none.pt"))


def test_a_file_that_ends_while_it_is_read_is_left_to_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.pt"
    torch.save(_nested(), path)
    asked = _asked(monkeypatch)
    monkeypatch.setattr("os.preadv", lambda *_: 0)
    found = parallel_read.load(str(path))
    assert asked == ["meta", "cpu"]
    assert _same(found, torch.load(path)) == 9


def test_an_error_of_the_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.pt"
    torch.save(_nested(), path)

    def preadv(*_: Any) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("os.preadv", preadv)
    with pytest.raises(OSError, match="Input/output error"):
        parallel_read.load(str(path))


def test_a_short_read_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = os.preadv
    path = tmp_path / "state.pt"
    torch.save(_nested(), path)
    wanted = torch.load(path)
    monkeypatch.setattr(
        "os.preadv", lambda f, into, at, *how: original(f, [into[0][:1000003]], at, *how)
    )
    asked = _asked(monkeypatch)
    assert _same(parallel_read.load(str(path)), wanted) == 9
    assert asked == ["meta"]


@pytest.mark.parametrize("cached", [True, False], ids=["page cache", "disk"])
def test_threads_are_for_what_the_page_cache_has(
    cached: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.pt"
    torch.save(_nested(), path)
    wanted = torch.load(path)
    original, stretch, stretches, offsets = os.preadv, parallel_read._read_stretch, [], []

    def preadv(file: int, into: Any, offset: int, flags: int = 0) -> int:
        if flags & os.RWF_NOWAIT and not cached:
            raise BlockingIOError
        if not flags:
            offsets.append(offset)
        return original(file, into, offset)

    def counting(*args: Any) -> None:
        stretches.append(args)
        stretch(*args)

    monkeypatch.setattr("os.preadv", preadv)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(parallel_read, "_read_stretch", counting)
    assert _same(parallel_read.load(str(path)), wanted) == 9
    assert len(stretches) == (2 if cached else 1)
    if not cached:
        assert offsets == sorted(offsets)
    assert len(offsets) > 5


def test_what_is_no_plain_value_is_not_executed(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"

    class Malicious:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"a": torch.ones(2), "b": Malicious()}, path)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        parallel_read.load(str(path))
    assert not (tmp_path / "executed").exists()
