"""What each preset and rule means for each optimizer's state, written out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_ext.errors import CheckpointError, PlanError
from megatron_ext.host.optimizers import ADAM, TABLE, OptimizerState
from megatron_ext.plan.fitting import fitted_preset, require_fit, require_own_state
from megatron_ext.plan.matching import overwritten
from megatron_ext.plan.parameters import Parameter
from megatron_ext.policy.match import Match, MomentRule
from megatron_ext.policy.policy import ResumePolicy
from megatron_ext.policy.presets import CATALOGUE, Preset
from megatron_ext.rules.base import Rule
from megatron_ext.rules.batch_size import BatchRatio
from megatron_ext.rules.bias_consistent import BiasConsistent
from megatron_ext.rules.elementwise import KEEP, RESET, Fill, Floor, Scale
from megatron_ext.rules.prune import Prune

ROWS = {row.name: row for row in TABLE}
ARGUMENTS = {
    "gradient-scale": (2.0,),
    "batch-sqrt": (1.0, 2.0),
    "batch-size": (1.0, 2.0),
    "relora": (0.5,),
}
KEPT = (KEEP, KEEP)
REFUSED = "refused"
#: Preset -> what it does to the two moments, where that is not what it does to Adam's.
ONE = {
    "reset": (RESET, KEEP),
    "gradient-scale": (Scale(2.0), KEEP),
    "bias-consistent": KEPT,
    "batch-size": KEPT,
    "relora": (Prune(0.5), KEEP),
}
APART: dict[str, dict[str, tuple[Rule, Rule] | str]] = {
    "Adam": {},
    "Adam of torch": {},
    **dict.fromkeys(("SGD", "Lion", "Muon", "Muon Hyperball"), ONE),
    # Its second moment is one of orthogonal matrices: their size is not the gradient's.
    "Adaptive Muon": {
        "gradient-scale": (Scale(2.0), KEEP),
        "bias-consistent": KEPT,
        "batch-size": KEPT,
    },
    "SOAP": {"gradient-scale": REFUSED, "batch-size": KEPT, "relora": REFUSED},
    "LaProp": {"gradient-scale": REFUSED, "batch-size": KEPT},
}
ADAMS: dict[str, tuple[Rule, Rule]] = {
    "keep": KEPT,
    "reset": (RESET, RESET),
    "reset-momentum": (RESET, KEEP),
    "bias-consistent": (BiasConsistent(), BiasConsistent()),
    "gradient-scale": (Scale(2.0), Scale(4.0)),
    "batch-sqrt": KEPT,
    "batch-size": (KEEP, BatchRatio(2.0)),
    "relora": (Prune(0.5), Prune(0.5)),
}


def test_every_preset_for_every_optimizer() -> None:
    cells = 0
    assert ADAMS.keys() == CATALOGUE.keys()
    assert APART.keys() == ROWS.keys()
    for name, row in ROWS.items():
        for preset, of_adam in ADAMS.items():
            policy = ResumePolicy(preset=Preset(preset, ARGUMENTS.get(preset, ())))
            expected = APART[name].get(preset, of_adam)
            if expected == REFUSED:
                with pytest.raises(PlanError, match=f"preset {preset}.*, w: "):
                    fitted_preset(policy, row, "w")
            else:
                assert fitted_preset(policy, row, "w") == expected, (name, preset)
            cells += 1
    assert cells == 9 * 8


def test_a_second_moment_is_scaled_by_the_square() -> None:
    """No row but Adam's has one that follows the gradient and nothing else that would have to."""
    row = replace(ROWS["SOAP"], rotated=False, follows_scale=True)
    policy = ResumePolicy(preset=Preset("gradient-scale", (2.0,)))
    assert fitted_preset(policy, row, "w") == (Scale(2.0), Scale(4.0))


#: Rule for both moments -> the rows that do not accept it for the first, the second.
WITHOUT_SECOND = {"SGD", "Lion", "Muon", "Muon Hyperball"}
RULES: list[tuple[Rule, set[str], set[str] | None]] = [
    (RESET, set(), WITHOUT_SECOND),
    (Scale(2.0), set(), WITHOUT_SECOND),
    (Fill(1.0), {"SOAP"}, WITHOUT_SECOND | {"SOAP"}),
    (Prune(0.5), {"SOAP"}, WITHOUT_SECOND | {"SOAP"}),
    (BiasConsistent(), WITHOUT_SECOND | {"Adaptive Muon"}, WITHOUT_SECOND | {"Adaptive Muon"}),
    (Floor(1.0), {"SOAP"}, WITHOUT_SECOND | {"SOAP"}),
    (BatchRatio(2.0), set(ROWS) - {"Adam", "Adam of torch"}, None),
]


def test_every_rule_for_every_optimizer() -> None:
    cells = 0
    for rule, of_first, of_second in RULES:
        for pair, refused in (((rule, KEEP), of_first), ((KEEP, rule), of_second)):
            if isinstance(rule, Floor | BatchRatio):  # of second moments only
                pair, refused = (KEEP, rule), of_second if of_second is not None else of_first
            asked = MomentRule(Match("*"), *pair)
            for name, row in ROWS.items():
                assert _refuses(asked, row) == (name in refused), (name, asked)
                cells += 1
    assert cells == 7 * 2 * 9


def _refuses(rule: MomentRule, row: OptimizerState, *, whole: bool = True) -> bool:
    said = ""
    try:
        require_fit(rule, row, "w", whole=whole)
    except PlanError as e:
        said = str(e)
    assert not said or f"rule {rule} matches w, which {row.name} updates" in said
    assert not said or str(row) in said
    return bool(said)


def test_rows_of_a_rotated_moment_are_no_rows_of_the_parameter() -> None:
    asked = MomentRule(Match("*"), RESET, KEEP)
    assert {name for name, row in ROWS.items() if _refuses(asked, row, whole=False)} == {"SOAP"}


def test_only_moments_that_there_are_need_not_be_read() -> None:
    parameter = Parameter("w", (4, 4), 0)
    policy = ResumePolicy(preset=Preset("reset"))
    assert overwritten(policy, parameter, {}) == {"exp_avg", "exp_avg_sq"}
    # Muon's second moment is kept: nothing is asked for it.
    assert overwritten(policy, parameter, {}, ROWS["Muon"]) == {"exp_avg"}
    refused = ResumePolicy(rules=(MomentRule(Match("*"), KEEP, RESET),))
    assert overwritten(refused, parameter, {}, ROWS["Muon"]) == frozenset()


def test_the_saved_groups_tell_whose_state_it_is() -> None:
    adam = {"lr": 1.0, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8}
    soap, lion = {**adam, "shampoo_beta": 0.9}, {k: v for k, v in adam.items() if k != "eps"}
    muon = {"lr": 1.0, "weight_decay": 0.1, "momentum": 0.9}
    sgd = {**muon, "dampening": 0, "nesterov": False}
    groups = {"Adam": adam, "SOAP": soap, "Lion": lion, "Muon": muon, "SGD": sgd}
    for saved, group in groups.items():
        for name in groups:
            if name == saved:
                require_own_state([group], ROWS[name])
                continue
            with pytest.raises(CheckpointError, match=f"are those of {saved}.*those of {name}"):
                require_own_state([group], ROWS[name])
    require_own_state([adam], ROWS["Adam of torch"])
    require_own_state([muon], ROWS["Muon Hyperball"])
    require_own_state([{"lr": 1.0}], ADAM)  # groups that tell nothing
