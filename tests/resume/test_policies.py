"""Moment rules on real ranks: the same global state as one process in float64, on every layout."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import FIRST, STEPS, Checkpoints
from tests.support.cells import chosen, of_every_version, with_all
from tests.support.harness import Hyper, Layout
from tests.support.pool import RankPool
from tests.support.rule_oracles import splitmix64
from tests.support.unsharded import State

SECOND = Hyper(lr=1e-3, min_lr=1e-4, betas=(0.8, 0.9), eps=1e-6, train_iters=60)

Moments = tuple[np.ndarray, np.ndarray]
Oracle = Callable[[str, np.ndarray, np.ndarray], Moments]


def drawn(name: str, shape: tuple[int, ...], probability: float, seed: int) -> np.ndarray:
    """Which elements of a parameter go at random: by name, seed and index, nothing else."""
    mask = (1 << 64) - 1

    def mixed(z: int) -> int:
        return splitmix64(z, 0)

    number = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
    key = mixed(mixed(seed & mask) ^ number)
    draws = [splitmix64(key, i) >> 11 for i in range(int(np.prod(shape)))]
    return (np.array(draws, dtype=np.float64) * 2.0**-53 < probability).reshape(shape)


def keep(name: str, m: np.ndarray, v: np.ndarray) -> Moments:
    return m, v


def reset_layer(name: str, m: np.ndarray, v: np.ndarray) -> Moments:
    return (0 * m, 0 * v) if name.startswith("decoder.layers.1.") else (m, v)


def rows(name: str, m: np.ndarray, v: np.ndarray) -> Moments:
    m, v = m.copy(), v.copy()
    if name == "output_layer.weight":
        m[40:] = 0
        v[40:] = v[:40].mean(0)
    if name == "embedding.word_embeddings.weight":
        m[:8] = m[8:].mean()
        v[:8] = np.quantile(v[8:], 0.5, method="lower")
    if name.endswith(".linear_fc2.weight"):
        m[3:9] *= 0.25
        v[3:9] = np.concatenate([v[:3], v[9:]]).mean()
    if name.endswith((".linear_qkv.weight", ".linear_fc1.weight")):
        m[11:] = m[:11].mean(0)
        v[11:] = v[:11].mean(0)
    return m, v


def batch_size(name: str, m: np.ndarray, v: np.ndarray) -> Moments:
    k, (b1, b2) = 4.0, FIRST.betas
    c1, c2 = 1 - b1**STEPS, 1 - b2**STEPS
    c = (1 - b1) / (1 + b1)
    g2 = np.clip(((m / c1) ** 2 - c * (v / c2)) / (1 - c), 0, v / c2)
    return m, c2 * (g2 + (v / c2 - g2) / k)


def at_random(name: str, m: np.ndarray, v: np.ndarray) -> Moments:
    if not name.endswith(".weight"):
        return m, v
    gone = drawn(name, m.shape, 0.5, 3)
    return np.where(gone, 0, m), np.where(gone, 0, v)


def scaled(name: str, m: np.ndarray, v: np.ndarray) -> Moments:
    return (m * 0.5, v * 0.25) if m.ndim == 2 else (m, v)


def above_quantile(name: str, m: np.ndarray, v: np.ndarray) -> Moments:
    def kept(x: np.ndarray) -> np.ndarray:
        return np.where(np.abs(x) > np.quantile(np.abs(x), 0.88, method="lower"), x, 0)

    return kept(m), kept(v)


def bias_consistent(name: str, m: np.ndarray, v: np.ndarray) -> Moments:
    (b1, b2), (c1, c2) = FIRST.betas, SECOND.betas
    return (
        m * (1 - c1**STEPS) / (1 - b1**STEPS),
        v * (1 - c2**STEPS) / (1 - b2**STEPS),
    )


def floored(name: str, m: np.ndarray, v: np.ndarray) -> Moments:
    return m, np.maximum(v, np.float32(1e-6))


def rule(match: str, m: str = "keep", v: str = "keep") -> str:
    return f"{{match: '{match}', exp_avg: {m}, exp_avg_sq: {v}}}"


AT_RANDOM = "prune-random 0.5 seed 3"
ROWS = ", ".join(
    [
        rule("output_layer.weight[40:]", "reset", "fill column-mean"),
        rule("embedding.word_embeddings.weight[:8]", "fill mean", "fill median"),
        rule("*.linear_fc2.weight[3:9]", "scale 0.25", "fill mean"),
        rule("re:.*[.]linear_(qkv|fc1)[.]weight[11:]", "fill column-mean", "fill column-mean"),
    ]
)

#: Name -> policy, oracle, and whether no rounding is due.
POLICIES: dict[str, tuple[str, Oracle, bool]] = {
    "keep": ("{}", keep, True),
    "reset by pattern": (
        f"moments: [{rule('decoder.layers.1.*', 'reset', 'reset')}]",
        reset_layer,
        True,
    ),
    "row fill": (f"moments: [{ROWS}]", rows, False),
    "batch-size": (f"moments: [{rule('*', 'keep', 'batch-size 4')}]", batch_size, False),
    "random": (
        f"moments: [{rule('re:.*[.]weight', AT_RANDOM, AT_RANDOM)}]",
        at_random,
        True,
    ),
}
#: On one layout only.
MORE_POLICIES: dict[str, tuple[str, Oracle, bool]] = {
    "scale by powers of two": (
        f"moments: [{rule('* ndim=2', 'scale 0.5', 'scale 0.25')}]",
        scaled,
        True,
    ),
    "relora": ("preset: relora 0.88", above_quantile, True),
    "bias-consistent": ("preset: bias-consistent", bias_consistent, False),
    "floor": (f"moments: [{rule('*', 'keep', 'floor 1e-6')}]", floored, True),
}

#: 20 is no power of two: the data-parallel cuts fall within rows.
BF16 = Layout(layers=4, hidden=20)
MOE = Layout(experts=4)

#: Transition -> layout and ranks before and after, without the format.
TRANSITIONS = {
    "dp 1 to 2": (BF16, 1, BF16, 2),
    "dp 2 to 4": (BF16, 2, BF16, 4),
    "dp 4 to 1": (BF16, 4, BF16, 1),
    "tp 1 to 2": (replace(BF16, gated=True), 2, replace(BF16, gated=True, tp=2), 2),
    "pp 1 to 2": (BF16, 1, replace(BF16, pp=2), 2),
    "vpp": (replace(BF16, pp=2, vpp=2), 2, replace(BF16, pp=2, vpp=2), 2),
    "ep 1 to 2": (MOE, 2, replace(MOE, ep=2), 2),
    "ep 2 to 4": (replace(MOE, ep=2), 2, replace(MOE, ep=4), 4),
}
FORMATS = ("dp_reshardable", "fully_reshardable", "torch")

_LEGACY = (
    "one file for each tensor, pipeline and expert parallel rank: megatron/training/"
    "checkpointing.py:297-347, get_checkpoint_name (0.19.2)"
)
_BUCKETS = (
    "the keys name buckets of the layout: megatron/core/optimizer/distrib_optimizer.py:1530-1600, "
    "sharded_param_state_dp_reshardable (0.19.2)"
)
_CHAIN = (
    "one optimizer without expert parallelism, a chain of two with it: megatron/core/optimizer/"
    "optimizer.py:1577-1582, ChainedOptimizer.load_state_dict (0.19.2)"
)
#: What the format itself does not allow, and where upstream says so.
REFUSED = {
    ("dp_reshardable", "tp 1 to 2"): _BUCKETS,
    ("dp_reshardable", "pp 1 to 2"): _BUCKETS,
    ("dp_reshardable", "ep 1 to 2"): _BUCKETS,
    ("dp_reshardable", "ep 2 to 4"): _BUCKETS,
    ("fully_reshardable", "ep 1 to 2"): _CHAIN,
    ("torch", "tp 1 to 2"): _LEGACY,
    ("torch", "pp 1 to 2"): _LEGACY,
    ("torch", "ep 1 to 2"): _LEGACY,
    ("torch", "ep 2 to 4"): _LEGACY,
}

#: Where parameters lie is read from Megatron's own objects: layouts change with every version.
EVERY_VERSION = {
    ("fully_reshardable", "pp 1 to 2"),
    ("torch", "dp 4 to 1"),
}
#: With those, every format and every way to cut the parameters; the others are run with --all.
CHOSEN = {
    ("fully_reshardable", "tp 1 to 2"),
    ("fully_reshardable", "ep 2 to 4"),
    ("dp_reshardable", "vpp"),
}
CELLS = [(f, t) for f in FORMATS for t in TRANSITIONS if (f, t) not in REFUSED]
_executed: list[tuple[str, str, str]] = []


def assert_is(found: State, before: State, oracle: Oracle, exact: bool) -> int:
    """Every element of every moment; master weights untouched. Number of elements changed."""
    assert set(found) == set(before)
    changed = 0
    for name, tensors in before.items():
        m, v = (tensors[k].astype(np.float64) for k in ("exp_avg", "exp_avg_sq"))
        wanted = dict(zip(("exp_avg", "exp_avg_sq"), oracle(name, m, v), strict=True))
        np.testing.assert_array_equal(found[name]["param"], tensors["param"])
        for key, value in wanted.items():
            ours = found[name][key]
            if exact:
                np.testing.assert_array_equal(ours, value.astype(np.float32), err_msg=name)
            else:
                np.testing.assert_allclose(ours, value, rtol=2e-6, atol=1e-20, err_msg=name)
            changed += int((ours != tensors[key]).sum())
    return changed


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("form", "transition"),
    of_every_version(CELLS, EVERY_VERSION, CHOSEN),
    ids=[f"{f}, {t}" for f, t in CELLS],
)
def test_rules_give_the_same_global_state_on_every_layout(
    form: str, transition: str, stock: RankPool, ext: RankPool, checkpoints: Checkpoints
) -> None:
    source, world_before, target, world = TRANSITIONS[transition]
    source, target = replace(source, format=form), replace(target, format=form)
    directory, _ = checkpoints.phase_1(source, world_before)
    before = stock.run(
        "tests.support.policies_stock:state",
        world_before,
        layout=source,
        hyper=FIRST,
        directory=directory,
    )[0]
    found = ext.run(
        "tests.support.policies:resumed",
        world,
        layout=target,
        hyper=SECOND,
        directory=directory,
        policies={name: text for name, (text, _, _) in POLICIES.items()},
    )[0]
    for name, (_, oracle, exact) in POLICIES.items():
        changed = assert_is(found[name]["state"], before, oracle, exact)
        assert (changed > 0) == (name != "keep")
        assert found[name]["steps"] == [STEPS]
        _executed.append((form, transition, name))


@pytest.mark.ranks
def test_so_many_cells_ran(request: pytest.FixtureRequest) -> None:
    """Last of the matrix: 15 of 24 layouts, 5 policies each; the other 9 are refused upstream."""
    if not _executed:
        pytest.skip("the matrix was deselected")
    ran = chosen(request, test_rules_give_the_same_global_state_on_every_layout)
    assert len(set(_executed)) == len(_executed) == len(POLICIES) * ran
    assert {form for form, _, _ in _executed} == {*FORMATS}
    assert len(CELLS) == 15
    assert len(REFUSED) == 9
    assert all("megatron/" in why and ".py:" in why for why in REFUSED.values())


@pytest.mark.ranks
def test_what_the_format_does_not_allow_is_refused(ext: RankPool, checkpoints: Checkpoints) -> None:
    source, world_before, target, world = TRANSITIONS["tp 1 to 2"]
    directory, _ = checkpoints.phase_1(source, world_before)
    failures = ext.run(
        "tests.support.policies:resumed",
        world,
        layout=target,
        hyper=SECOND,
        directory=directory,
        policies={"keep": "{}"},
        allow_failure=True,
    )
    assert [f.type for f in failures] == ["CheckpointError"] * world
    assert "--dist-ckpt-optim-fully-reshardable" in failures[0].message


#: Layout and ranks, as our optimizer and as stock's; stock cannot load torch AdamW.
LIVE = {
    "distributed": (BF16, 2),
    "chained": (replace(MOE, ep=2), 2),
    "bf16 not distributed": (replace(BF16, distributed=False), 2),
    "fp32 not distributed": (replace(BF16, distributed=False, dtype="fp32"), 1),
    "adamw": (replace(BF16, adam="torch"), 2),
}
LIVE_CELLS = [(name, ours) for name in LIVE for ours in (True, False) if ours or name != "adamw"]
#: The others are run with --all.
LIVE_CHOSEN = [("distributed", False), ("chained", True), ("bf16 not distributed", True)]


@pytest.mark.ranks
@pytest.mark.parametrize(("name", "ours"), with_all(LIVE_CELLS, LIVE_CHOSEN))
def test_a_live_optimizer_is_changed_in_place_by_the_same_rules(
    name: str, ours: bool, ext: RankPool, checkpoints: Checkpoints
) -> None:
    layout, world = LIVE[name]
    directory, _ = checkpoints.phase_1(layout, world)
    some = {
        k: v for k, v in (POLICIES | MORE_POLICIES).items() if k not in ("keep", "bias-consistent")
    }
    found = ext.run(
        "tests.support.policies:transformed",
        world,
        layout=layout,
        hyper=FIRST,
        directory=directory,
        policies={"nothing": "moments: [{match: '*'}]"} | {k: t for k, (t, _, _) in some.items()},
        ours=ours,
    )[0]
    before = found["nothing"]["state"]
    for name, (_, oracle, exact) in some.items():
        assert assert_is(found[name]["state"], before, oracle, exact) > 0
        assert found[name]["in place"]
        assert found[name]["steps"] == [STEPS]


@pytest.mark.ranks
def test_each_rule_equals_float64_on_the_unsharded_state(
    stock: RankPool, ext: RankPool, checkpoints: Checkpoints
) -> None:
    layout = replace(BF16, tp=2)
    directory, _ = checkpoints.phase_1(layout, 4)
    arguments: dict[str, Any] = {"layout": layout, "directory": directory}
    before = stock.run("tests.support.policies_stock:state", 4, hyper=FIRST, **arguments)[0]
    texts = {name: text for name, (text, _, _) in MORE_POLICIES.items()}
    found = ext.run("tests.support.policies:resumed", 4, hyper=SECOND, policies=texts, **arguments)[
        0
    ]
    for name, (_, oracle, exact) in MORE_POLICIES.items():
        assert assert_is(found[name]["state"], before, oracle, exact) > 0, name


@pytest.mark.ranks
def test_a_rank_with_an_empty_group_is_changed_like_the_others(
    stock: RankPool, ext: RankPool, tmp_path: Path
) -> None:
    """The stand-in, apex and TE before 2.19 do not count the steps of a group without parameters.

    Rank 1 holds a part of the embedding, and nothing of the group without weight decay.
    """
    layout = Layout(trained="word_embeddings|final_layernorm")
    directory = str(tmp_path / f"iter_{STEPS:07d}")
    run: dict[str, Any] = dict(layout=layout, hyper=FIRST)
    stock.run("tests.support.old:written", 2, steps=STEPS, directory=directory, **run)
    half = f"moments: [{rule('*', 'scale 0.5', 'scale 0.25')}]"
    for path, begun in ((None, 0), (directory, STEPS)):
        found = ext.run(
            "tests.support.te_runs:transformed",
            2,
            directory=path,
            live=[half, half],
            steps=2,
            more=1,
            **run,
        )
        assert [one["steps"] for one in found] == [[begun + 4]] * 2
