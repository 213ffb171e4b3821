"""Where the state of each parameter comes from, decided from keys and shapes alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pytest

from megatron_ext.checkpoint.names import OBJECT, Place, Style
from megatron_ext.errors import CheckpointError, MegatronExtError, PlanError, PolicyError
from megatron_ext.plan.mapped import CopiedParameter, LeftParameter, Mapped, NewParameter, Wanted
from megatron_ext.plan.parameter_map import plan_map
from megatron_ext.policy.match import Match, MomentRule
from megatron_ext.policy.parameter_map import NO_MAP, Copy, ParameterMap
from megatron_ext.rules.elementwise import KEEP, RESET, Fill, Scale

Shapes = Mapping[str, tuple[int, ...] | None]
KINDS = {"": "weights", "optimizer.state.param.": "master"} | {
    f"optimizer.state.{key}.": key for key in ("exp_avg", "exp_avg_sq")
}
LAYERS = "decoder.layers.mlp.weight"


def stored(**shapes: tuple[int, ...]) -> dict[str, tuple[int, ...] | None]:
    """Keys and shapes of a checkpoint: weights, master weights and moments."""
    return {f"{p}{key.replace('__', '.')}": shape for key, shape in shapes.items() for p in KINDS}


def wanted(
    shapes: Mapping[str, tuple[int, ...]], frozen: str = "^$", rows: str = "^$"
) -> list[Wanted]:
    """The requests of a model with these tensors; layers are the first axis of ``layers.``."""
    out = []
    for key, shape in shapes.items():
        axes = shape[:1] if re.search(r"layers\.(?!\d)", key) else ()
        leads = [(i,) for i in range(axes[0])] if axes else [()]
        for prefix, kind in KINDS.items():
            trained = [
                lead
                for lead in leads
                if not prefix or not re.search(frozen, key.replace("layers.", f"layers.{lead}."))
            ]
            if trained:
                tail = shape[len(axes) :]
                resizable = re.search(rows, key) is not None
                out.append(
                    Wanted(kind, prefix + key, key, "", axes, tail, resizable, tuple(trained))
                )
    return out


def planned(
    asked: ParameterMap, now: Mapping[str, tuple[int, ...]], before: Shapes, **kwargs: Any
) -> Mapped:
    strict = kwargs.pop("strict", True)
    return plan_map(asked, wanted(now, **kwargs), before, Style(), strict=strict)


def copies(*pairs: tuple[str, str]) -> ParameterMap:
    return ParameterMap(copies=tuple(Copy(*pair) for pair in pairs))


TWO = stored(a=(4, 3), b=(4,), decoder__layers__mlp__weight=(2, 4, 3))
MODEL = {"a": (4, 3), "b": (4,), LAYERS: (2, 4, 3)}


def test_the_same_model_requests_what_megatron_does() -> None:
    assert planned(NO_MAP, MODEL, TWO) == Mapped()
    assert not planned(NO_MAP, MODEL, TWO).changes_request


def test_a_frozen_parameter_leaves_its_moments() -> None:
    found = planned(NO_MAP, MODEL, TWO, frozen="^b")
    assert found == Mapped(left=(LeftParameter("b", 4, "frozen"),))
    one = planned(NO_MAP, MODEL, TWO, frozen=r"layers\.\(0")
    assert one.left == (LeftParameter("decoder.layers.0.mlp.weight", 12, "frozen"),)
    assert one.partial
    assert one.changes_request


def test_a_load_of_the_optimizer_alone_has_nothing_left_over() -> None:
    now = [one for one in wanted(MODEL, frozen="^b") if one.kind != "weights"]
    found = plan_map(NO_MAP, now, TWO, Style())
    assert found.left == (LeftParameter("b", 4, "frozen"),)


def test_a_thawed_parameter_has_its_weights() -> None:
    before = {k: v for k, v in TWO.items() if not k.endswith("exp_avg.b")}
    before = {k: v for k, v in before.items() if k.partition("state.")[2].partition(".")[2] != "b"}
    with pytest.raises(CheckpointError, match=r"b \(moments only are missing\)"):
        planned(NO_MAP, MODEL, before)
    found = planned(ParameterMap(new=("b",)), MODEL, before)
    assert found.new == (NewParameter("b", 4, weights=False, moments=True),)
    assert {key: place for key, place in found.sources.items() if place is not None} == {}
    assert {kind for kind, _, _ in found.sources} == {"master", "exp_avg", "exp_avg_sq"}


def test_a_new_parameter_has_to_be_named() -> None:
    now = {**MODEL, "c": (5,)}
    with pytest.raises(CheckpointError) as caught:
        planned(NO_MAP, now, TWO)
    assert "in the model: c (weights and moments are missing)" in str(caught.value)
    assert "--selective-new-parameters PATTERN" in str(caught.value)
    assert "--selective-drop-parameters" not in str(caught.value)
    found = planned(ParameterMap(new=("c*",)), now, TWO)
    assert found.new == (NewParameter("c", 5, weights=True, moments=True),)
    assert set(found.sources.values()) == {None}


def test_a_parameter_that_is_left_over_has_to_be_named() -> None:
    now = {"a": (4, 3), LAYERS: (2, 4, 3)}
    with pytest.raises(CheckpointError, match="in the checkpoint only: b") as caught:
        planned(NO_MAP, now, TWO)
    assert "--selective-drop-parameters PATTERN" in str(caught.value)
    assert planned(ParameterMap(drop=("b",)), now, TWO).left == (LeftParameter("b", 4, "dropped"),)


def test_another_shape_is_told_and_may_be_new() -> None:
    now = {**MODEL, "a": (4, 6)}
    with pytest.raises(CheckpointError, match=r"a has shape \(4, 3\) there, \(4, 6\) in the model"):
        planned(NO_MAP, now, TWO)
    found = planned(ParameterMap(new=("a",)), now, TWO)
    assert found.new == (NewParameter("a", 24, weights=True, moments=True),)
    assert found.left == (LeftParameter("a", 12, "replaced"),)


def test_rows_may_differ_where_megatron_allows_it() -> None:
    assert planned(NO_MAP, {**MODEL, "a": (8, 3)}, TWO, rows="^a") == Mapped()
    with pytest.raises(CheckpointError):
        planned(NO_MAP, {**MODEL, "a": (8, 4)}, TWO, rows="^a")


def test_more_layers_are_copied_from_those_that_there_are() -> None:
    now = {**MODEL, LAYERS: (4, 4, 3)}
    found = planned(copies(("decoder.layers.{n}.*", "decoder.layers.{n-2}.*")), now, TWO)
    assert found.copied == tuple(
        CopiedParameter(
            f"decoder.layers.{n}.mlp.weight", f"decoder.layers.{n - 2}.mlp.weight", "all"
        )
        for n in (2, 3)
    )
    assert {
        (kind, lead[0]): (place.lead, place.axes)
        for (kind, _, lead), place in found.sources.items()
        if place is not None
    } == {(kind, n): ((n % 2,), (2,)) for kind in KINDS.values() for n in range(4)}


def test_the_layers_may_be_stored_in_another_way() -> None:
    single = stored(a=(4, 3), b=(4,))
    for n in (0, 1):
        single |= stored(**{f"decoder__layers__{n}__mlp__weight": (4, 3)})
    found = planned(NO_MAP, MODEL, single)
    key = "optimizer.state.exp_avg.decoder.layers.1.mlp.weight"
    assert found.sources["exp_avg", f"optimizer.state.exp_avg.{LAYERS}", (1,)] == Place(
        key, (), (), (4, 3)
    )
    assert (found.new, found.left, found.copied) == ((), (), ())
    numbered = {f"decoder.layers.{n}.mlp.weight": (4, 3) for n in (0, 1)}
    back = planned(NO_MAP, {"a": (4, 3), "b": (4,), **numbered}, TWO)
    assert back.sources["weights", "decoder.layers.0.mlp.weight", ()] == Place(
        LAYERS, (0,), (2,), (4, 3)
    )


def test_weights_or_moments_alone() -> None:
    asked = ParameterMap(copies=(Copy("b", "c", "weights"),))
    before = {**TWO, **stored(c=(4,))}
    now = {**MODEL, "c": (4,)}
    found = planned(asked, now, before)
    assert found.copied == (CopiedParameter("b", "c", "weights"),)
    assert {kind for kind, key, _ in found.sources} == {"weights", "master"}
    assert found.left == ()
    found = planned(ParameterMap(copies=(Copy("b", "c", "moments"),)), now, before)
    assert {kind for kind, key, _ in found.sources} == {"exp_avg", "exp_avg_sq"}
    assert found.left == (LeftParameter("b", 4, "replaced"),)


def test_a_copy_of_the_weights_of_a_new_parameter_has_no_moments() -> None:
    found = planned(ParameterMap(copies=(Copy("d", "a", "weights"),)), {**MODEL, "d": (4, 3)}, TWO)
    assert found.new == (NewParameter("d", 12, weights=False, moments=True),)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (
            ParameterMap(new=("x*",)),
            "--selective-new-parameters x*: the checkpoint lacks nothing of",
        ),
        (ParameterMap(new=("a",)), "--selective-new-parameters a: the checkpoint lacks nothing"),
        (ParameterMap(drop=("x*",)), "--selective-drop-parameters x*: the model has"),
        (ParameterMap(drop=("b",)), "--selective-drop-parameters b: the model has"),
        (copies(("x.{n}", "a")), "parameters: copy x.{n} from a: it applies to none of"),
    ],
)
def test_a_pattern_that_matches_nothing(asked: ParameterMap, says: str) -> None:
    with pytest.raises(PlanError) as caught:
        planned(asked, MODEL, TWO)
    assert says in str(caught.value)
    assert "decoder.layers.0.mlp.weight" in str(caught.value)
    assert planned(asked, MODEL, TWO, strict=False) == Mapped()


@pytest.mark.parametrize(
    ("asked", "error", "says"),
    [
        (copies(("b", "x")), PlanError, "the checkpoint has no weights of x, which b is to be"),
        (
            copies(("b", "a")),
            PlanError,
            "a has shape (4, 3) in the checkpoint, b (4,) in the model",
        ),
        (copies(("b", "a"), ("b*", "b")), PolicyError, "b has two sources for its weights"),
    ],
)
def test_a_copy_that_cannot_be_made(
    asked: ParameterMap, error: type[MegatronExtError], says: str
) -> None:
    with pytest.raises(error) as caught:
        planned(asked, MODEL, TWO)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("rule", "conflict"),
    [
        (MomentRule(Match("b"), RESET, RESET), True),
        (MomentRule(Match("*", ndim=1), RESET, Fill(1.0)), True),
        (MomentRule(Match("*", ndim=2), RESET, RESET), False),
        (MomentRule(Match("b"), RESET, KEEP), False),
        (MomentRule(Match("b"), Scale(0.5), Scale(0.5)), False),
        (MomentRule(Match("b", (2, None)), RESET, RESET), False),
        (MomentRule(Match("a"), RESET, RESET), False),
    ],
)
def test_a_copy_that_a_rule_overwrites(rule: MomentRule, conflict: bool) -> None:
    before = {**TWO, **stored(c=(4,))}
    now = wanted({**MODEL, "c": (4,)})
    weights = ParameterMap(copies=(Copy("b", "c", "weights"),))
    assert plan_map(weights, now, before, Style(), rules=[rule]).copied
    both = copies(("b", "c"))
    if conflict:
        with pytest.raises(PlanError, match="overwrites both of them"):
            plan_map(both, now, before, Style(), rules=[rule])
    else:
        assert plan_map(both, now, before, Style(), rules=[rule]).copied


def test_long_lists_are_cut() -> None:
    now = {**MODEL, **{f"x{i}": (1,) for i in range(20)}}
    with pytest.raises(CheckpointError, match="and 12 more") as caught:
        planned(NO_MAP, now, TWO)
    assert len(str(caught.value)) < 1500


def test_the_state_of_another_optimizer_is_left_to_megatron() -> None:
    before = {k: v for k, v in TWO.items() if not k.startswith("optimizer")}
    assert planned(NO_MAP, MODEL, {**before, "optimizer.state.momentum.a": (4, 3)}).sources == {}


def test_a_master_weight_that_no_fp32_run_has_is_its_weight() -> None:
    before = {k: v for k, v in TWO.items() if ".param." not in k}
    found = planned(NO_MAP, MODEL, before)
    place = found.sources["master", "optimizer.state.param.a", ()]
    assert place == Place("a", (), (), (4, 3))
    assert (found.new, found.left) == ((), ())


def test_the_extra_state_of_a_module_follows_its_parameters() -> None:
    key = "decoder.layers.mlp._extra_state"
    before = {**TWO, f"{key}/shard_0_2": None, f"{key}/shard_1_2": None}
    asked = copies(("decoder.layers.{n}.*", "decoder.layers.{n-2}.*"))
    now = wanted({**MODEL, LAYERS: (3, 4, 3)})
    now.append(Wanted(OBJECT, key, key, "", (3,), (), False, ((0,), (1,), (2,))))
    found = plan_map(asked, now, before, Style())
    assert found.sources[OBJECT, key, (2,)] == Place(key, (0,), (2,), ())
    fresh = ParameterMap(new=("decoder.layers.2.*",))
    assert plan_map(fresh, now, before, Style()).sources[OBJECT, key, (2,)] is None


def test_the_names_are_the_models() -> None:
    fused = "decoder.layers.self_attention.linear_qkv.layer_norm_weight"
    before = stored(**{fused.replace(".", "__"): (1, 4)})
    now = wanted({fused: (2, 4)})
    for style, name in ((Style(local=True), "input_layernorm.weight"), (Style(), fused[15:])):
        with pytest.raises(CheckpointError, match=rf"decoder.layers.1.{name} "):
            plan_map(NO_MAP, now, before, style)
