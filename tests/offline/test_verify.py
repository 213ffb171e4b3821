"""``verify``: every byte of every item is proven, and what is wrong is named."""

from __future__ import annotations

import argparse
import json
import pickle
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_ext.checkpoint.stored import open_checkpoint
from megatron_ext.cli import main
from megatron_ext.schemas import generated
from tests.conftest import Checkpoints
from tests.support import flips, inspected
from tests.support.cells import chosen, with_all
from tests.support.harness import Layout

pytestmark = pytest.mark.ranks

FULL = Layout(format="fully_reshardable")
#: Layout, ranks, and whether the master weights are stored by parameter.
CELLS: dict[str, tuple[Layout, int, bool]] = {
    "fully_reshardable, 2 ranks": (FULL, 2, True),
    "tp 2": (replace(FULL, tp=2), 2, True),
    "dp_reshardable, 2 ranks": (Layout(), 2, False),
    "gated experts": (replace(FULL, gated=True, experts=2), 1, True),
    "fp32": (replace(FULL, dtype="fp32"), 1, True),
    "not distributed": (replace(FULL, distributed=False), 1, True),
    "legacy, 2 ranks": (Layout(format="torch"), 2, False),
}
#: The others are like one of these.
CHOSEN = ("tp 2", "dp_reshardable, 2 ranks", "gated experts", "legacy, 2 ranks")
FLIPS = 16
RAN: list[str] = []


def verified(root: Path | str, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    """The exit status and the document."""
    status = main(["verify", str(root), "--json"])
    told = capsys.readouterr()
    assert told.err == "", told.err
    document = json.loads(told.out)
    jsonschema.validate(document, json.loads(generated()["verify.schema.json"]))
    return status, document


@pytest.mark.parametrize("name", with_all(CELLS, CHOSEN))
def test_a_flipped_bit_of_any_record_is_found(
    name: str, checkpoints: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layout, world, by_parameter = CELLS[name]
    source, _ = checkpoints.phase_1(layout, world)
    root = tmp_path / "copy"
    shutil.copytree(source, root)
    directory = open_checkpoint(root).directory
    status, document = verified(root, capsys)
    assert (status, document["damages"], document["values"]) == (0, [], [])
    assert (document["master_weights"]["elements"] > 5000) == by_parameter
    assert len(document["notes"]) == (0 if by_parameter else 1)
    records = list(flips.records(directory))
    items = {(r.path, r.item) for r in records}
    assert document["items"] == len(items)
    assert document["files"] == len({r.path for r in records}) > 0
    chance = random.Random(7)
    for record in chance.sample(records, FLIPS):
        at, bit = record.begin + chance.randrange(record.size), chance.randrange(8)
        flips.flip(record.path, at, bit)
        status = main(["verify", str(root), "--json"])
        told = capsys.readouterr()
        assert status == 2, record
        if told.out:
            (damage,) = json.loads(told.out)["damages"]
            assert damage["file"] == record.path.relative_to(directory).as_posix()
            assert damage["item"] == record.key
        else:  # the state that is needed to open it at all
            assert record.path.name in told.err
        flips.flip(record.path, at, bit)
    assert verified(root, capsys)[0] == 0
    RAN.append(name)


def test_every_cell_ran(request: pytest.FixtureRequest) -> None:
    assert len(CELLS) == 7
    assert len(RAN) == len(set(RAN)) == chosen(request, test_a_flipped_bit_of_any_record_is_found)


WEIGHT, MASTER = "w", "optimizer.state.param.w"
MOMENT, SQUARE = "optimizer.state.exp_avg.w", "optimizer.state.exp_avg_sq.w"


def small(directory: Path, cuts: inspected.Cut | None = None, **changes: torch.Tensor) -> Path:
    """A checkpoint of one parameter of 8 x 6 elements, whose master weights it holds in fp32."""
    torch.manual_seed(1)
    master = torch.randn(8, 6)
    tensors = {
        WEIGHT: master.bfloat16(),
        MASTER: master,
        MOMENT: torch.randn(8, 6),
        SQUARE: torch.rand(8, 6),
        **changes,
    }
    return inspected.store(directory, tensors, {MASTER: cuts} if cuts else None)


def test_values_that_training_cannot_use_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    square, weight = torch.rand(8, 6), torch.randn(8, 6)
    square[3], square[0, 0] = -1e-30, torch.nan
    weight[1, 1], weight[1, 2] = torch.inf, torch.nan
    moment = torch.randn(8, 6).to(torch.float8_e4m3fn)
    changes = {SQUARE: square, WEIGHT: weight.bfloat16(), MASTER: weight, MOMENT: moment}
    status, document = verified(small(tmp_path / "ck", **changes), capsys)
    assert status == 1
    assert document["damages"] == document["master_weights"]["differences"] == []
    assert {v["name"]: (v["elements"], v["of"]) for v in document["values"]} == {
        WEIGHT: (2, 48),
        MASTER: (2, 48),
        SQUARE: (7, 48),
    }


def test_the_values_of_a_legacy_file_have_a_path(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rank = tmp_path / "mp_rank_00"
    rank.mkdir()
    state = {"model": {"a.b": torch.full((4,), torch.inf)}, "iteration": 3}
    torch.save(state, rank / "model_optim_rng.pt")
    moments = {"exp_avg_sq": torch.tensor([1.0, -1.0]), "step": torch.tensor(3.0)}
    torch.save({0: {"buffer": [moments]}}, rank / "distrib_optim.pt")
    status, document = verified(tmp_path, capsys)
    assert status == 1
    assert [(v["name"], v["elements"], v["of"]) for v in document["values"]] == [
        ("mp_rank_00/distrib_optim.pt: 0.buffer.0.exp_avg_sq", 1, 2),
        ("mp_rank_00/model_optim_rng.pt: model.a.b", 4, 4),
    ]


@pytest.mark.parametrize("cut", [False, True])
def test_master_weights_of_another_model_are_counted(
    cut: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cuts = [(slice(0, 5), slice(0, 6)), (slice(5, 8), slice(0, 6))] if cut else None
    status, document = verified(small(tmp_path / "same", cuts), capsys)
    equal = {"elements": 48, "differences": [], "rounded_twice": 0, "remainders": 0}
    assert (status, document["master_weights"]) == (0, equal)
    other = torch.randn(8, 6, generator=torch.Generator().manual_seed(2))
    status, document = verified(small(tmp_path / "other", cuts, **{MASTER: other}), capsys)
    (found,) = document["master_weights"]["differences"]
    assert status == 1
    assert document["master_weights"]["elements"] == found["of"] == 48
    torch.manual_seed(1)
    wanted = other.bfloat16().double() - torch.randn(8, 6).bfloat16().double()
    assert (found["name"], found["elements"]) == (WEIGHT, int((wanted != 0).sum()))
    assert found["largest"] == float(wanted.abs().max())


def whole(seed: int) -> torch.Tensor:
    """Remainders as stock stores them by parameter."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(1 << 15), 1 << 15, (8, 6), generator=generator).float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.int16])
@pytest.mark.parametrize("cut", [False, True])
def test_remainders_are_not_taken_for_master_weights(
    cut: bool, dtype: torch.dtype, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cuts = [(slice(0, 5), slice(0, 6)), (slice(5, 8), slice(0, 6))] if cut else None
    low = whole(3).to(dtype)
    directory = small(tmp_path / "ck", cuts, **{MASTER: low})
    status, document = verified(directory, capsys)
    assert status == 0
    found = {"elements": 0, "differences": [], "rounded_twice": 0, "remainders": 48}
    assert document["master_weights"] == found
    assert main(["inspect", str(directory), "--moments", "--json"]) == 0
    inspected_ = json.loads(capsys.readouterr().out)
    assert inspected_["master_weights"] == found
    assert ("remainders" in " ".join(inspected_["notes"])) == (dtype == torch.int16)
    assert main(["verify", str(directory)]) == 0
    assert "48 elements were not compared: they are remainders" in capsys.readouterr().out


def test_whole_numbers_beside_master_weights_are_no_remainders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = {"v": torch.ones(8, 6).bfloat16(), "optimizer.state.param.v": torch.full((8, 6), 1.001)}
    status, document = verified(small(tmp_path / "ck", None, **{MASTER: whole(3)}, **other), capsys)
    assert status == 1
    assert document["master_weights"]["remainders"] == 0
    assert [d["name"] for d in document["master_weights"]["differences"]] == [WEIGHT]


def test_fp16_master_weights_are_one_rounding_away(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exact = torch.randn(8, 6, generator=torch.Generator().manual_seed(5))
    exact[0, 0] = 1 + 2.0**-8 + 2.0**-12  # rounded to fp16 it is a tie of bf16
    scale = exact.abs().max() / 32752
    master = (exact / scale).half().float() * scale
    different = int((master.bfloat16() != exact.bfloat16()).sum())
    assert different > 0
    state: dict[str, Any] = {WEIGHT: exact.bfloat16(), MASTER: master}

    def verify(name: str, dtype: torch.dtype | None, **changes: torch.Tensor) -> Any:
        args = {} if dtype is None else {"args": argparse.Namespace(main_params_dtype=dtype)}
        directory = inspected.store(tmp_path / name, {**state, **changes}, common=args)
        return *verified(directory, capsys), (main(["verify", str(directory)]), capsys.readouterr())

    status, document, (_, told) = verify("known", torch.float16)
    masters = document["master_weights"]
    assert (status, masters["differences"], masters["elements"]) == (0, [], 48)
    assert masters["rounded_twice"] == different
    assert f"{different} of these are one rounding away" in told.out
    for name, dtype in (("unknown", None), ("fp32", torch.float32)):
        status, document, (_, told) = verify(name, dtype)
        (found,) = document["master_weights"]["differences"]
        assert (status, found["elements"]) == (1, different)
        assert "the checkpoint's arguments do not name" in told.out
    edited = master.clone()
    edited[3, 3] *= 1.01
    status, document, (_, told) = verify("edited", torch.float16, **{MASTER: edited})
    (found,) = document["master_weights"]["differences"]
    assert (status, found["elements"]) == (1, 1)
    assert "the optimizer state does not belong to the weights" in told.out


def test_a_view_of_a_longer_storage_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def view(tensor: torch.Tensor) -> bytes:
        longer = torch.full((tensor.numel() * 2,), torch.nan, dtype=tensor.dtype)
        longer[::2] = tensor.reshape(-1)
        return inspected.saved(longer.view(*tensor.shape, 2)[..., 0])

    directory = inspected.store(tmp_path / "ck", {MOMENT: torch.ones(8, 6)}, payload=view)
    status, document = verified(directory, capsys)
    assert (status, document["values"]) == (0, [])


def _without_a_place(index: Any) -> None:
    del index.storage_data[MetadataIndex(MOMENT, torch.Size([0, 0]))]


def _without_a_tensor(index: Any) -> None:
    del index.state_dict_metadata[MOMENT]


def _shorter_piece(index: Any) -> None:
    index.state_dict_metadata[MOMENT].chunks[0].sizes = torch.Size([7, 6])


def _shared_bytes(index: Any) -> None:
    index.storage_data[MetadataIndex(MOMENT, torch.Size([0, 0]))].offset -= 1


def _other_dtype(index: Any) -> None:
    index.state_dict_metadata[MOMENT].properties.dtype = torch.float16


INDEX_FAULTS: dict[Callable[[Any], None], str] = {
    _without_a_place: f"expected a place for the piece of {MOMENT} at (0, 0), found none",
    _without_a_tensor: f"expected places of tensors and objects, found one for {MOMENT}, which",
    _shorter_piece: f"expected pieces of {MOMENT} that fill (8, 6), found 42 of 48 elements",
    _shared_bytes: f"expected items with bytes of their own, found {MASTER} and {MOMENT}, which",
    _other_dtype: "elements of torch.float32; the index says torch.float16",
}


@pytest.mark.parametrize("fault", INDEX_FAULTS)
def test_an_index_that_does_not_fit_is_damaged(
    fault: Callable[[Any], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = small(tmp_path / "ck")
    index = pickle.loads((directory / ".metadata").read_bytes())
    fault(index)
    (directory / ".metadata").write_bytes(pickle.dumps(index))
    status, document = verified(directory, capsys)
    assert status == 2
    assert any(d["problem"].startswith(INDEX_FAULTS[fault]) for d in document["damages"])


def test_the_table_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = small(tmp_path / "ck")
    assert main(["verify", str(directory)]) == 0
    assert "5 items of 2 files" in (told := capsys.readouterr().out)
    assert told.endswith("bytes read: nothing wrong was found\n")
    (record,) = (r for r in flips.records(directory) if r.key == SQUARE and "/data/" in r.name)
    flips.flip(record.path, record.begin)
    assert main(["verify", str(directory)]) == 2
    told = capsys.readouterr().out
    assert "restore these files, or load another iteration" in told
    assert "Bad CRC-32 for file" in told
    assert SQUARE in told
