"""The layout of buckets that a dry run writes, and what inspect and diff make of it."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Mapping
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch

from megatron_ext.base.placement import Block
from megatron_ext.checkpoint.bucket_layout import Bucket, BucketLayout, Placed
from megatron_ext.checkpoint.stored import open_checkpoint
from megatron_ext.cli import main
from megatron_ext.errors import CheckpointError
from megatron_ext.offline import slabs
from megatron_ext.offline.moment_scan import distances, scan
from tests.conftest import FIRST, STEPS
from tests.support import inspected
from tests.support.cells import chosen, of_every_version
from tests.support.checkpoints import checkpoint
from tests.support.groups import group
from tests.support.harness import Layout
from tests.support.pool import RankPool
from tests.support.unsharded import State

SCHEMA = json.loads(
    files("megatron_ext").joinpath("schemas/parameter-layout.schema.json").read_text()
)
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
BF16 = Layout()
#: Layout, ranks, and at least how many buckets its model has in all.
CELLS: dict[str, tuple[Layout, int, int]] = {
    "dp2": (BF16, 2, 1),
    "dp4": (BF16, 4, 1),
    "fp32": (replace(BF16, dtype="fp32"), 2, 1),
    "tp2": (replace(BF16, tp=2), 2, 2),
    "tp2-dp2-gated": (replace(BF16, tp=2, gated=True), 4, 2),
    "pp2-vpp2": (replace(BF16, pp=2, vpp=2), 2, 4),
    "moe": (Layout(experts=4, ep=2), 2, 3),
    "buckets": (replace(BF16, overlap=True), 2, 5),
}
#: Run without --all too.
CHOSEN = {"fp32", "tp2-dp2-gated", "pp2-vpp2", "moe"}
RAN: list[str] = []


def figures(values: np.ndarray) -> tuple[int, float, float]:
    """Elements, largest and norm in float64."""
    exact = values.astype(np.float64).ravel()
    return exact.size, float(np.abs(exact).max()), float(np.linalg.norm(exact))


def assert_same_figures(found: Any, expected: tuple[int, float, float]) -> None:
    assert (found.elements, found.largest) == expected[:2]
    np.testing.assert_allclose(found.norm, expected[2], rtol=1e-13)
    assert found.nonfinite == 0


@pytest.mark.ranks
@pytest.mark.parametrize("name", of_every_version(CELLS, ["buckets"], CHOSEN))
def test_parameters_in_buckets_are_the_optimizers(name: str, ext: RankPool, tmp_path: Path) -> None:
    layout, world, buckets = CELLS[name]
    ((state,), *_) = ext.run(
        "tests.support.bucket_cases:saved_both_ways",
        world,
        layout=layout,
        hyper=FIRST,
        steps=STEPS,
        directory=str(tmp_path),
    )
    file = tmp_path / "parameter-layout.json"
    VALIDATOR.validate(json.loads(file.read_text()))
    read = BucketLayout.read(file)
    assert len(read.buckets) >= buckets
    found = scan(open_checkpoint(tmp_path / "dp_reshardable"), layout=read)
    by_name = {(s.state, s.name): s for s in found}
    assert len(by_name) == len(found) == 3 * len(state)
    for parameter, tensors in state.items():
        for key, values in tensors.items():
            assert_same_figures(by_name[key, parameter], figures(values))
    if name != "buckets":  # Megatron itself saves those wrongly by parameters
        assert_same_as_by_parameters(tmp_path / "fully_reshardable", state, by_name)
    RAN.append(name)


def assert_same_as_by_parameters(
    directory: Path, state: State, by_name: Mapping[tuple[str, str], Any]
) -> None:
    """The format that names parameters has those of all layers and experts in one tensor."""
    whole = {(s.state, s.name): s for s in scan(open_checkpoint(directory))}
    names = inspected.stacked_names(state)
    assert set(whole) == set(itertools.product(("param", "exp_avg", "exp_avg_sq"), names))
    for (key, stacked), expected in whole.items():
        parts = [by_name[key, parameter] for parameter in names[stacked]]
        assert sum(p.elements for p in parts) == expected.elements
        assert max(p.largest for p in parts) == expected.largest
        np.testing.assert_allclose(math.hypot(*(p.norm for p in parts)), expected.norm, rtol=1e-13)


@pytest.mark.ranks
@pytest.mark.matrix
def test_every_cell_ran(request: pytest.FixtureRequest) -> None:
    assert len(CELLS) == 8
    assert (
        len(RAN) == len(set(RAN)) == chosen(request, test_parameters_in_buckets_are_the_optimizers)
    )


@pytest.mark.ranks
def test_distances_of_parameters_in_buckets(
    ext: RankPool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (states, _) = ext.run(
        "tests.support.bucket_cases:saved_both_ways",
        2,
        layout=replace(BF16, tp=2),
        hyper=FIRST,
        steps=STEPS,
        directory=str(tmp_path),
        more=2,
    )
    words = [str(tmp_path / "dp_reshardable"), str(tmp_path / "later"), "--moments"]
    layout = ["--layout", str(tmp_path / "parameter-layout.json")]
    assert main(["diff", *words, *layout, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)["distances"]
    assert len(found) == 3 * len(states[0])
    for d in found:
        x, y = (state[d["name"]][d["state"]].astype(np.float64).ravel() for state in states)
        np.testing.assert_allclose(d["distance"], np.linalg.norm(y - x), rtol=1e-12)
        assert (d["elements"], d["different"]) == (x.size, np.count_nonzero(x != y))
    # It is of this model, cut as it was.
    (tmp_path / "other").mkdir()
    ext.run(
        "tests.support.bucket_cases:saved_both_ways",
        2,
        layout=BF16,
        hyper=FIRST,
        steps=1,
        directory=str(tmp_path / "other"),
    )
    layout[1] = str(tmp_path / "other" / "parameter-layout.json")
    assert main(["diff", *words, *layout]) == 2
    told = capsys.readouterr().err
    assert f"--layout with {tmp_path / 'dp_reshardable'}: expected the layout of the run" in told
    assert "dp_group_idx_1" in told
    assert "is in the checkpoint only" in told


@pytest.mark.ranks
def test_without_a_distributed_optimizer_there_are_no_buckets(ext: RankPool) -> None:
    assert ext.run("tests.support.bucket_cases:layout_of_none", 2, hyper=FIRST) == [None, None]


KEY = "optimizer.distributed.dp_group_idx_{}.gbuf_idx_0.dtype_(torch.bfloat16, torch.float32)"
FIRST_KEY, SECOND_KEY = (f"{KEY.format(n)}.bucket_idx_0" for n in (0, 1))

#: A matrix that is cut by columns over two ranks, a vector that both have, and one's own.
BY_HAND = BucketLayout(
    "0.19.2",
    (
        Bucket(
            FIRST_KEY,
            200,
            (
                Placed("norm", (10,), 0, 10, (Block(10),)),
                Placed("w", (10, 20), 64, 164, (Block(100, 0, 10, 20),)),
            ),
        ),
        Bucket(
            SECOND_KEY,
            230,
            (
                Placed("norm", (10,), 0, 10, (Block(10),)),
                Placed("w", (10, 20), 64, 164, (Block(100, 10, 10, 20),)),
                Placed("last", (3, 2), 192, 198, (Block(6),)),
            ),
        ),
    ),
)


def by_hand(directory: Path, seed: int, buckets: BucketLayout = BY_HAND) -> dict[str, torch.Tensor]:
    """A checkpoint of these buckets, cut at random, NaN between the parameters."""
    generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    tensors, cuts = {}, {}
    for bucket, state in itertools.product(buckets.buckets, ("exp_avg", "exp_avg_sq", "param")):
        values = torch.full((bucket.elements,), math.nan)
        for p in bucket.parameters:
            values[p.begin : p.end] = torch.randn(p.end - p.begin, generator=generator)
        tensors[f"{bucket.key}.{state}"] = values
        at = [0, *sorted(rng.sample(range(1, bucket.elements), 7)), bucket.elements]
        cuts[f"{bucket.key}.{state}"] = [
            (slice(low, high),) for low, high in itertools.pairwise(at)
        ]
    saved = {"param_groups": [group(step=5)]}
    common = {"optimizer": {"optimizer": saved, "param_state_sharding_type": "dp_reshardable"}}
    inspected.store(directory, tensors, cuts, common)
    return tensors


@pytest.mark.parametrize("seed", range(4))
def test_pieces_of_buckets_may_be_cut_anywhere(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slabs, "SLAB_BYTES", 40)
    a, b = (by_hand(tmp_path / str(i), 2 * seed + i) for i in range(2))
    stored = [open_checkpoint(tmp_path / str(i)) for i in range(2)]
    found = {(s.state, s.name): s for s in scan(stored[0], layout=BY_HAND)}
    apart = {(d.state, d.name): d for d in distances(*stored, layout=BY_HAND)}
    assert len(found) == len(apart) == 9
    for state in ("exp_avg", "exp_avg_sq", "param"):
        one, two = f"{FIRST_KEY}.{state}", f"{SECOND_KEY}.{state}"
        ours, theirs = (
            {
                "norm": t[one][:10].double().numpy(),
                "w": torch.cat([t[one][64:164], t[two][64:164]]).double().numpy(),
                "last": t[two][192:198].double().numpy(),
            }
            for t in (a, b)
        )
        for name, values in ours.items():
            assert_same_figures(found[state, name], figures(values))
            d = apart[state, name]
            distance = np.linalg.norm(theirs[name] - values)
            np.testing.assert_allclose(d.distance, distance, rtol=1e-12)
            assert (d.elements, d.different) == (values.size, values.size)


def changed(**changes: Any) -> dict[str, Any]:
    """The document of `BY_HAND` with other values in its first bucket."""
    document = json.loads(json.dumps(_document(BY_HAND)))
    for path, value in changes.items():
        target = document
        *steps, last = (int(s) if s.isdigit() else s for s in path.split("__"))
        for step in steps:
            target = target[step]
        target[last] = value
    return document


def _document(layout: BucketLayout) -> Any:
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        return json.loads(layout.write(Path(directory)).read_text())


def test_a_layout_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = BY_HAND.write(tmp_path / "new")
    with path.open("rb") as earlier:
        before = earlier.read()
        replace(BY_HAND, megatron="0.0.0").write(path.parent)
        earlier.seek(0)
        # Who has it open goes on reading what was there.
        assert earlier.read() == before
        assert path.read_bytes() != before
    assert BY_HAND.write(path.parent) == path
    assert [file.name for file in path.parent.iterdir()] == ["parameter-layout.json"]
    assert BucketLayout.read(path) == BY_HAND
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    VALIDATOR.validate(json.loads(path.read_text()))
    with pytest.raises(jsonschema.ValidationError):
        VALIDATOR.validate(changed(buckets__0__elements=-1))


FAULTS: dict[str, tuple[Any, str]] = {
    "no file": (None, "FileNotFoundError"),
    "not JSON": ("{", "JSONDecodeError"),
    "not text": (b"\xff\xfe\x00", "UnicodeDecodeError"),
    "a list": ([], "TypeError"),
    "another document": ({"schema": "megatron_ext/resume-report/1"}, "expected 'megatron_ext/para"),
    "no buckets": ({"schema": "megatron_ext/parameter-layout/1"}, "KeyError"),
    "text for a number": (changed(buckets__0__elements="9"), "'9' where a number of elements"),
    "a negative number": (changed(buckets__0__parameters__0__begin=-1), "-1 where a number"),
    "a bucket twice": (changed(buckets__1__key=FIRST_KEY), "is there twice"),
    "overlap": (changed(buckets__0__parameters__1__begin=5), "w at 5 to 164 with 100 elements"),
    "outside": (changed(buckets__0__elements=163), "does not fit into"),
    "incomplete": (
        changed(buckets__1__parameters__1__blocks__0__base=0),
        "w of shape (10, 20) has 100 of 200 elements",
    ),
    "two shapes": (changed(buckets__1__parameters__0__shape=[5, 2]), "norm has the shapes"),
    "another field": (changed(buckets__0__parameters__0__blocks__0__x=1), "TypeError"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_layout_is_one_clear_error(
    fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, said = FAULTS[fault]
    by_hand(tmp_path / "a", 1)
    path = tmp_path / "layout.json"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    words = ["inspect", str(tmp_path / "a"), "--moments", "--layout", str(path)]
    assert main(words) == 2
    told = capsys.readouterr()
    assert told.err.startswith(f"error: --layout {path}: expected the parameter-layout.json that ")
    assert said in told.err
    assert (told.err.count("\n"), told.out) == (1, "")
    BY_HAND.write(tmp_path).rename(path)
    assert main(words) == 0


MISFITS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "another size": (
        {"buckets__0__elements": 201},
        ["of exp_avg, ", "bucket_idx_0 has 200 elements in the checkpoint, 201 in the layout"],
    ),
    "other keys": (
        {"buckets__0__key": FIRST_KEY.replace("gbuf_idx_0", "gbuf_idx_3")},
        [
            "gbuf_idx_0.dtype_(torch.bfloat16, torch.float32).bucket_idx_0 is in the checkpoint",
            "gbuf_idx_3.dtype_(torch.bfloat16, torch.float32).bucket_idx_0 is in the layout only",
        ],
    ),
    "another chain": (
        {"buckets__0__key": f"chained_0.{FIRST_KEY}", "buckets__1__key": f"chained_0.{SECOND_KEY}"},
        [f"{FIRST_KEY} is in the checkpoint only", f"chained_0.{SECOND_KEY} is in the layout only"],
    ),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_the_layout_of_another_model_is_refused(
    misfit: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, said = MISFITS[misfit]
    by_hand(tmp_path / "a", 1)
    path = tmp_path / "layout.json"
    path.write_text(json.dumps(changed(**changes)))
    for words in (["inspect", str(tmp_path / "a")], ["diff", *2 * [str(tmp_path / "a")]]):
        assert main([*words, "--moments", "--layout", str(path)]) == 2
        told = capsys.readouterr()
        start = f"error: --layout with {tmp_path / 'a'}: expected the layout of the run that wrote"
        assert told.err.startswith(start)
        assert all(words in told.err for words in said)
        assert "Write it with --selective-dry-run --selective-report DIR" in told.err
        assert (told.err.count("\n"), told.out) == (1, "")


def test_of_many_differences_some_are_named() -> None:
    known = {f"key {n}": 1 for n in range(10)}
    assert BucketLayout("", ()).misfits({}) == ""
    said = BucketLayout("", ()).misfits(known)
    assert said.count("is in the checkpoint only") == 4
    assert said.endswith("; and 6 more")


def test_a_layout_is_for_the_moments_of_buckets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = BY_HAND.write(tmp_path)
    inspected.store(tmp_path / "named", {"optimizer.state.exp_avg.w": torch.ones(4)})
    legacy = checkpoint(tmp_path / "legacy")
    cells = {
        "--layout without --moments": [str(tmp_path / "named")],
        "expected dp_reshardable, whose moments are in buckets, found fully_reshardable": [
            str(tmp_path / "named"),
            "--moments",
        ],
        "expected the format torch_dist, found torch": [str(legacy), "--moments"],
    }
    for wanted, words in cells.items():
        assert main(["inspect", *words, "--layout", str(path)]) == 2
        told = capsys.readouterr()
        assert wanted in told.err
        assert (told.err.count("\n"), told.out) == (1, "")


def test_a_gap_between_pieces_is_named(tmp_path: Path) -> None:
    import pickle

    by_hand(tmp_path / "a", 3)
    path = tmp_path / "a" / ".metadata"
    index = pickle.loads(path.read_bytes())
    key = f"{SECOND_KEY}.exp_avg"
    gone = next(c for c in index.state_dict_metadata[key].chunks if c.offsets[0] > 0)
    index.state_dict_metadata[key].chunks.remove(gone)
    path.write_bytes(pickle.dumps(index))
    with pytest.raises(CheckpointError, match=r"without a gap, found none for element \d+\. The"):
        scan(open_checkpoint(tmp_path / "a"), layout=replace_last(gone.offsets[0]))


def replace_last(at: int) -> BucketLayout:
    """`BY_HAND` with one parameter more where the piece is missing."""
    first, second = BY_HAND.buckets
    one = Placed("everything", (230,), 0, 230, (Block(230),))
    assert 0 < at < 230
    return BucketLayout("", (first, replace(second, parameters=(one,))))
