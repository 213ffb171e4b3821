"""A transition happens exactly once: which phase a checkpoint belongs to, and what that decides."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.checkpoint.state import MARK_KEY, DirectoryRole
from megatron_ext.errors import CheckpointError, PlanError
from megatron_ext.policy.match import GroupRule, Match, MomentRule
from megatron_ext.policy.phase import Mark, decide, digest_of, identity, same_checkpoint
from megatron_ext.policy.policy import ResumePolicy
from megatron_ext.policy.presets import Preset
from megatron_ext.rules.elementwise import KEEP, Scale
from megatron_ext.rules.registry import parse
from tests.support.groups import group
from tests.support.policy_strategies import POLICIES

SOURCE = "phase1@10#0123456789abcdef"
NOTHING = ResumePolicy()
NAMED = ResumePolicy(phase="b")
RESET = ResumePolicy(preset=Preset("reset"))
RELORA = ResumePolicy(preset=Preset("relora", (0.5,)))

WHERES: tuple[DirectoryRole, ...] = ("load", "start", "own")
MARKS = st.builds(
    Mark,
    st.sampled_from(("", "a", "b")),
    st.text(max_size=30),
    st.text(max_size=20),
    st.integers(),
)


def named(policy: ResumePolicy, name: str) -> ResumePolicy:
    return replace(policy, phase=name)


def mark_of(policy: ResumePolicy, offset: int = 0) -> Mark:
    """What the checkpoints of a phase carry that was begun with a policy."""
    return Mark(policy.phase, SOURCE, digest_of(policy), offset)


# --- a transition or a restart

#: The checkpoint's mark.
NONE = None
OURS = mark_of(RESET)
OURS_NAMED = mark_of(named(RESET, "b"))
OTHER_NAME = mark_of(named(RESET, "a"))
OTHER_POLICY = mark_of(RELORA)
OTHER_POLICY_SAME_NAME = mark_of(named(RELORA, "b"))
WITHOUT_OPERATIONS = mark_of(NAMED)
#: Where the checkpoint lies, its mark, the policy -> what the resume is.
TABLE: list[tuple[DirectoryRole, Mark | None, ResumePolicy, str]] = [
    # --load may be an earlier phase's directory or this one's.
    ("load", NONE, NOTHING, "none"),
    ("load", OURS, NOTHING, "none"),
    ("load", OURS_NAMED, NOTHING, "none"),
    ("load", NONE, RESET, "applied"),
    ("load", OURS, RESET, "continued"),
    ("load", OTHER_POLICY, RESET, "applied"),
    ("load", OTHER_NAME, RESET, "applied"),
    ("load", NONE, named(RESET, "b"), "applied"),
    ("load", OURS, named(RESET, "b"), "applied"),
    ("load", OURS_NAMED, named(RESET, "b"), "continued"),
    ("load", OTHER_NAME, named(RESET, "b"), "applied"),
    ("load", OTHER_POLICY_SAME_NAME, named(RESET, "b"), "another policy"),
    ("load", WITHOUT_OPERATIONS, named(RESET, "b"), "another policy"),
    ("load", NONE, NAMED, "applied"),
    ("load", OURS, NAMED, "applied"),
    ("load", OTHER_NAME, NAMED, "applied"),
    ("load", OURS_NAMED, NAMED, "continued"),
    ("load", WITHOUT_OPERATIONS, NAMED, "continued"),
    # Where a phase starts it begins, whatever the checkpoint is.
    *(
        ("start", mark, policy, "applied")
        for mark in (NONE, OURS, OURS_NAMED, OTHER_POLICY, OTHER_POLICY_SAME_NAME)
        for policy in (NOTHING, NAMED, RESET, named(RESET, "b"))
    ),
    # In its own directory it goes on, or there is a mistake.
    ("own", OURS, RESET, "continued"),
    ("own", OURS, NOTHING, "continued"),
    ("own", OURS_NAMED, named(RESET, "b"), "continued"),
    ("own", OURS_NAMED, NAMED, "continued"),
    ("own", WITHOUT_OPERATIONS, NAMED, "continued"),
    ("own", mark_of(NOTHING), NOTHING, "continued"),
    ("own", NONE, NOTHING, "not its own"),
    ("own", NONE, RESET, "not its own"),
    ("own", mark_of(NOTHING), RESET, "not its own"),
    ("own", OTHER_POLICY, RESET, "not its own"),
    ("own", OTHER_NAME, RESET, "not its own"),
    ("own", OTHER_NAME, NOTHING, "not its own"),
    ("own", OTHER_NAME, named(RESET, "b"), "not its own"),
    ("own", OTHER_POLICY_SAME_NAME, named(RESET, "b"), "not its own"),
    ("own", OURS, named(RESET, "b"), "not its own"),
]


@pytest.mark.parametrize(
    ("where", "mark", "policy", "expected"),
    TABLE,
    ids=[f"{w}-{n}-{e.replace(' ', '-')}" for n, (w, _, _, e) in enumerate(TABLE)],
)
def test_what_a_resume_is(
    where: DirectoryRole, mark: Mark | None, policy: ResumePolicy, expected: str
) -> None:
    refused = {
        "another policy": r"--selective-phase b: the checkpoint belongs to phase 'b', started from",
        "not its own": "holds a checkpoint of another phase: found .*expected",
    }
    if expected in refused:
        with pytest.raises(PlanError, match=refused[expected]):
            decide(policy, mark, SOURCE, where)
        return
    phase = decide(policy, mark, SOURCE, where)
    assert phase.state == expected
    assert phase.asked == policy
    if expected == "applied":
        assert phase.policy == policy
        assert phase.mark == mark_of(policy)
    elif expected == "continued":
        assert phase.policy.operations == ()
        assert phase.mark == mark
        assert "moments, step and counters are kept" in phase.why
    else:
        assert phase.policy == policy
        assert phase.mark == mark


def test_the_table_has_every_place_and_every_outcome() -> None:
    assert {row[0] for row in TABLE} == set(WHERES)
    assert {row[3] for row in TABLE} == {
        *("none", "applied", "continued", "another policy", "not its own")
    }
    keys = [(w, m, p) for w, m, p, _ in TABLE]
    assert all(keys.count(key) == 1 for key in keys)


@given(
    policy=POLICIES, saved=st.none() | MARKS, where=st.sampled_from(WHERES), offset=st.integers()
)
def test_a_phase_that_has_begun_goes_on(
    policy: ResumePolicy, saved: Mark | None, where: DirectoryRole, offset: int
) -> None:
    try:
        first = decide(policy, saved, SOURCE, where)
    except PlanError:
        return
    first = first.at(offset)
    if first.state == "none":
        assert first.policy.operations == ()
        return
    for again_where in ("load", "own"):
        if again_where == "load" and not policy.operations and not policy.phase:
            continue
        written = Mark.parse(str(first.mark))
        again = decide(policy, written, "phase2@12#fedcba9876543210", again_where)
        assert again.state == "continued"
        assert again.policy.operations == ()
        assert again.mark == first.mark
        assert again.mark is not None
        assert again.mark.offset == offset


@given(policy=POLICIES, saved=st.none() | MARKS, where=st.sampled_from(WHERES))
def test_an_operation_is_never_left_out_but_by_a_mark_that_says_it_was_done(
    policy: ResumePolicy, saved: Mark | None, where: DirectoryRole
) -> None:
    try:
        phase = decide(policy, saved, SOURCE, where)
    except PlanError:
        return
    if policy.operations and phase.policy.operations != policy.operations:
        assert saved is not None
        assert (saved.phase, saved.operations) == (policy.phase, digest_of(policy))
        assert where != "start"


def test_the_offset_of_the_data_goes_from_a_phase_to_the_next() -> None:
    saved = mark_of(RELORA, offset=80)
    for where in ("load", "start"):
        phase = decide(RESET, saved, SOURCE, where)
        assert phase.mark is not None
        assert phase.mark.offset == 80
    assert decide(RESET, None, SOURCE).at(0).mark == mark_of(RESET)
    assert decide(NOTHING, None, SOURCE).at(80).mark is None


@pytest.mark.parametrize(
    ("where", "mark", "policy", "words"),
    [
        (
            "own",
            None,
            named(RESET, "b"),
            ["--load and --save", "no mark of a phase", "phase 'b'", "preset reset", "an empty"],
        ),
        ("own", OTHER_NAME, RESET, ["phase 'a'", SOURCE, "a phase without a name", "restore the"]),
        ("own", None, NOTHING, ["without a name with: no change of state"]),
        (
            "load",
            OTHER_POLICY_SAME_NAME,
            named(RESET, "b"),
            ["phase 'b'", "expected preset reset", "Restore the flags", "another name"],
        ),
    ],
)
def test_an_error_says_what_was_found_expected_and_the_way_out(
    where: DirectoryRole, mark: Mark | None, policy: ResumePolicy, words: list[str]
) -> None:
    with pytest.raises(PlanError) as caught:
        decide(policy, mark, SOURCE, where)
    for word in words:
        assert word in str(caught.value)


# --- the digest


@settings(max_examples=30)
@given(policy=POLICIES, other=POLICIES, shuffle=st.randoms())
def test_the_digest_knows_no_hyperparameter_and_no_order(
    policy: ResumePolicy, other: ResumePolicy, shuffle: Any
) -> None:
    rules = list(policy.rules)
    shuffle.shuffle(rules)
    changed = replace(
        policy,
        keep_hyperparameters=other.keep_hyperparameters,
        take_hyperparameters=other.take_hyperparameters,
        hyperparameters=other.hyperparameters,
        schedule=other.schedule,
        groups=other.groups,
        rules=tuple(rules),
        nonfinite=other.nonfinite,
        strict=other.strict,
        phase=other.phase,
    )
    assert digest_of(changed) == digest_of(policy)
    assert (digest_of(policy) == "none") == (policy.operations == ())


#: What saved checkpoints say of these rules: neither the words nor the digest may ever change.
WRITTEN = (
    ("reset", "reset", "reset", "reset"),
    ("scale 2", "scale 4", "scale 2.0", "scale 4.0"),
    ("scale -0.5", "fill 1e-8", "scale -0.5", "fill 1e-08"),
    ("fill 0.25", "fill median", "fill 0.25", "fill median"),
    ("fill mean", "fill column-mean", "fill mean", "fill column-mean"),
    ("fill column-mean", "floor 1e-12", "fill column-mean", "floor 1e-12"),
    ("prune 0.9", "prune 0.9", "prune 0.9", "prune 0.9"),
    (
        *("prune-random 0.5", "prune-random 0.5 seed -7"),
        *("prune-random 0.5", "prune-random 0.5 seed -7"),
    ),
    ("prune-random 0.5 seed 7", "batch-size 4", "prune-random 0.5 seed 7", "batch-size 4.0"),
    ("bias-consistent", "bias-consistent", "bias-consistent", "bias-consistent"),
)


def test_the_digests_in_saved_checkpoints_hold() -> None:
    rules = (MomentRule(Match(f"w{i}"), parse(m), parse(v)) for i, (m, v, *_) in enumerate(WRITTEN))
    policy = ResumePolicy(rules=tuple(rules))
    assert policy.operations == tuple(
        f"rule 'w{i}' (exp_avg: {m}, exp_avg_sq: {v})" for i, (*_, m, v) in enumerate(WRITTEN)
    )
    assert digest_of(policy) == "1cfc5768afde96c9"


@pytest.mark.parametrize(
    ("preset", "digest"),
    [
        (Preset("reset"), "86c7815db9d21234"),
        (Preset("gradient-scale", (0.125,)), "dd22e60fef7c6a5c"),
        (Preset("batch-size", (256, 1024)), "aba1657527a68c7b"),
        (Preset("relora", (0.9,)), "5122d0255d49e106"),
        (Preset("bias-consistent"), "f9051641c79043ec"),
    ],
    ids=str,
)
def test_the_digests_of_presets_in_saved_checkpoints_hold(preset: Preset, digest: str) -> None:
    assert digest_of(ResumePolicy(preset=preset)) == digest


def test_what_a_preset_does_to_hyperparameters_is_no_part_of_the_digest() -> None:
    whole = ResumePolicy(preset=Preset("batch-size", (8, 16)))
    for decline in (("lr",), ("lr", "betas", "eps")):
        declined = ResumePolicy(preset=Preset("batch-size", (8, 16), decline))
        assert digest_of(declined) == digest_of(whole)
    moments = ResumePolicy(preset=Preset("batch-size", (8, 16), ("exp_avg_sq",)))
    assert digest_of(moments) == "none"


@given(one=POLICIES, other=POLICIES)
def test_equal_operations_have_equal_digests_and_others_do_not(
    one: ResumePolicy, other: ResumePolicy
) -> None:
    assert (digest_of(one) == digest_of(other)) == (one.operations == other.operations)


@pytest.mark.parametrize(
    "change",
    [
        {"preset": Preset("relora", (0.5,))},
        {"preset": Preset("batch-size", (8, 32))},
        {"rules": (MomentRule(Match("w"), Scale(0.5)),)},
        {"step": 0},
        {"step": "reset"},
        {"reset_iteration": True},
        {"reset_iteration": True, "schedule_position": "continue"},
        {"reset_dataloader": True},
        {"schedule_position": "restart"},
        {"grad_scaler": "reset"},
    ],
)
def test_every_operation_is_part_of_the_digest(change: dict[str, Any]) -> None:
    policy = ResumePolicy(preset=Preset("batch-size", (8, 16)))
    changed = replace(policy, **change)
    assert digest_of(changed) != digest_of(policy)
    assert decide(changed, mark_of(policy), SOURCE).state == "applied"


def test_a_number_is_the_same_however_it_is_written() -> None:
    """1 in a flag and 1.0 in a file are one policy, and a restart may use either."""
    one, other = (
        ResumePolicy(
            rules=(MomentRule(Match("w", group=(("wd_mult", n),)), Scale(n), Scale(n)),),
            groups=(GroupRule((("wd_mult", n),), ("eps",)),),
        )
        for n in (2, 2.0)
    )
    assert one == other
    assert digest_of(one) == digest_of(other)


def test_true_is_not_1_in_the_digest() -> None:
    rules = [(MomentRule(Match(group=(("a", v),)), KEEP, Scale(2.0)),) for v in (True, 1)]
    assert len({digest_of(ResumePolicy(rules=r)) for r in rules}) == 2


def test_the_digests_that_checkpoints_already_carry() -> None:
    """A changed digest would apply a transition twice at the next restart after an upgrade."""
    assert digest_of(NOTHING) == "none"
    assert digest_of(RESET) == "86c7815db9d21234"
    rich = ResumePolicy(
        rules=(MomentRule(Match("w", (3, None), group=(("wd_mult", 1.0),)), Scale(0.5)),),
        step=7,
        reset_iteration=True,
        reset_dataloader=True,
        grad_scaler="reset",
    )
    text = (
        "rule 'w[3:] wd_mult=1' (exp_avg: scale 0.5, exp_avg_sq: keep)\nstep 7\niteration reset\n"
        "data position reset\nschedule restart\ngrad scaler reset"
    )
    assert digest_of(rich) == hashlib.sha256(text.encode()).hexdigest()[:16]


# --- the mark


@given(mark=MARKS)
def test_a_mark_is_read_back_from_its_text(mark: Mark) -> None:
    assert Mark.parse(str(mark)) == mark
    assert isinstance(str(mark), str)


GOOD = {"phase": "b", "from": SOURCE, "operations": "none", "offset": 0}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "b",
        "null",
        "3",
        "[]",
        "{}",
        str(OURS)[:-1],
        *(json.dumps({k: v for k, v in GOOD.items() if k != gone}) for gone in GOOD),
        *(json.dumps({**GOOD, "offset": v}) for v in ("x", "8", None, [], {}, 1.5, True)),
        *(json.dumps({**GOOD, "offset": float(v)}) for v in ("inf", "nan")),
        *(json.dumps({**GOOD, k: v}) for k in ("phase", "from") for v in (None, 3, ["b"], {})),
        json.dumps({**GOOD, "operations": None}),
        "[" * 100_000,
    ],
)
def test_a_damaged_mark_is_an_error_that_names_it(text: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        Mark.parse(text)
    assert f"{MARK_KEY} = " in str(caught.value)
    assert "expected phase, from, operations, offset and done" in str(caught.value)
    assert len(str(caught.value)) < 1000


# --- which checkpoint

ARGUMENTS = {"seed": 1, "save": "/a/phase1", "global_batch_size": 8, "train_iters": 10}


def identified(
    name: str = "phase1",
    iteration: int = 10,
    step: int | None = 10,
    arguments: dict[str, Any] = ARGUMENTS,
    **changes: Any,
) -> str:
    return identity(name, iteration, arguments, [group(**changes)], step)


def test_an_identity_has_a_name_for_people_and_says_the_iteration() -> None:
    assert identified().startswith("phase1@10#")
    assert same_checkpoint(identified(), identified("moved"))


@pytest.mark.parametrize(
    "changes",
    [
        {"iteration": 11},
        {"step": 11},
        {"step": None},
        {"arguments": {**ARGUMENTS, "seed": 2}},
        {"arguments": {**ARGUMENTS, "save": "/b"}},
        {"arguments": {}},
        {"max_lr": 1e-3},
        {MARK_KEY: str(OURS)},
    ],
)
def test_two_checkpoints_are_told_apart(changes: dict[str, Any]) -> None:
    assert not same_checkpoint(identified(**changes), identified())


@pytest.mark.parametrize(
    ("key", "one", "other"),
    [
        ("lr", torch.tensor(0.5), 0.5),
        ("lr", torch.tensor(0.1), float(torch.tensor(0.1))),
        ("lr", np.float64(0.1), 0.1),
        ("wd_mult", np.float32(0.5), 0.5),
        ("step_of_something", torch.tensor(3), 3),
        ("capturable", np.bool_(True), True),
    ],
)
def test_a_loaded_checkpoint_and_its_file_have_one_identity(key: str, one: Any, other: Any) -> None:
    """`megatron_ext.checkpoint.store` reads numpy's and torch's numbers as plain ones."""
    assert identified(**{key: one}) == identified(**{key: other})


def test_what_is_no_plain_value_does_not_count() -> None:
    assert identified(betas=(0.8, 0.9), foreach=None, big=torch.zeros(2)) == identified()
