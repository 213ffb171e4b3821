"""What a plan says of parameters that change, from metadata and arguments alone."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from typing import Any

import pytest

from megatron_ext.checkpoint.stored import StoredCheckpoint, open_checkpoint
from megatron_ext.errors import MegatronExtError
from megatron_ext.offline.findings import Findings
from megatron_ext.offline.forecast import forecast
from megatron_ext.offline.parameter_forecast import forecast_parameters
from megatron_ext.plan.mapped import Mapped
from megatron_ext.policy.parameter_map import Copy, ParameterMap
from megatron_ext.policy.policy import ResumePolicy
from tests.conftest import FIRST, Checkpoints
from tests.support.harness import Layout
from tests.support.planned import words

pytestmark = pytest.mark.ranks

FULL = Layout(format="fully_reshardable")


def planned(
    stored: StoredCheckpoint,
    parameters: ParameterMap | None = None,
    *,
    tied: bool = False,
    **args: Any,
) -> tuple[Mapped, list[MegatronExtError], list[str]]:
    before = {
        "num_layers": 2,
        "untie_embeddings_and_output_weights": not tied,
        "mtp_num_layers": None,
        "transformer_impl": "local",
    }
    now = {**before, **args}
    found = Findings()
    policy = ResumePolicy(parameters=parameters or ParameterMap())
    mapped = forecast_parameters(stored, Namespace(**before), Namespace(**now), policy, found)
    return mapped, found.errors, found.notes


@pytest.fixture
def stored(checkpoints: Checkpoints) -> StoredCheckpoint:
    return open_checkpoint(checkpoints.phase_1(FULL, 1)[0])


@pytest.fixture
def by_layer(checkpoints: Checkpoints) -> StoredCheckpoint:
    return open_checkpoint(checkpoints.phase_1(replace(FULL, by_layer=True), 1)[0])


def test_nothing_is_said_of_the_same_model(stored: StoredCheckpoint) -> None:
    assert planned(stored) == (Mapped(), [], [])


@pytest.mark.parametrize("name", ["stored", "by_layer"])
def test_more_layers_are_refused_or_copied(name: str, request: pytest.FixtureRequest) -> None:
    checkpoint = request.getfixturevalue(name)
    _, errors, _ = planned(checkpoint, num_layers=4)
    assert "decoder.layers.2.input_layernorm.bias (weights and moments are missing)" in str(errors)
    deeper = ParameterMap(copies=(Copy("decoder.layers.{n}.*", "decoder.layers.{n-2}.*"),))
    mapped, errors, notes = planned(checkpoint, deeper, num_layers=4)
    assert errors == []
    assert "as far as arguments tell" in notes[0]
    assert {one.name.split(".")[2]: one.source.split(".")[2] for one in mapped.copied} == {
        "2": "0",
        "3": "1",
    }
    assert len(mapped.copied) == 24
    fresh, errors, _ = planned(checkpoint, ParameterMap(new=("decoder.layers.2.*",)), num_layers=3)
    assert errors == []
    assert {one.name: one.elements for one in fresh.new}[
        "decoder.layers.2.mlp.linear_fc1.weight"
    ] == 512
    assert len(fresh.new) == 12


@pytest.mark.parametrize("name", ["stored", "by_layer"])
def test_fewer_layers_are_refused_or_dropped(name: str, request: pytest.FixtureRequest) -> None:
    checkpoint = request.getfixturevalue(name)
    _, errors, _ = planned(checkpoint, num_layers=1)
    assert "in the checkpoint only: decoder.layers.1." in str(errors)
    mapped, errors, _ = planned(
        checkpoint, ParameterMap(drop=("decoder.layers.1.*",)), num_layers=1
    )
    assert errors == []
    assert {(one.why, one.name.split(".")[2]) for one in mapped.left} == {("dropped", "1")}


def test_a_tied_and_an_untied_output_layer(
    stored: StoredCheckpoint, checkpoints: Checkpoints
) -> None:
    _, errors, _ = planned(stored, untie_embeddings_and_output_weights=False)
    assert "in the checkpoint only: output_layer.weight" in str(errors)
    tied = open_checkpoint(checkpoints.phase_1(replace(FULL, tied=True), 1)[0])
    untied = {"untie_embeddings_and_output_weights": True}
    assert planned(tied, tied=True) == (Mapped(), [], [])
    _, errors, _ = planned(tied, tied=True, **untied)
    assert "output_layer.weight (weights and moments are missing)" in str(errors)
    untie = ParameterMap(copies=(Copy("output_layer.weight", "embedding.word_embeddings.weight"),))
    mapped, errors, _ = planned(tied, untie, tied=True, **untied)
    assert errors == []
    assert [(c.name, c.source) for c in mapped.copied] == [
        ("output_layer.weight", "embedding.word_embeddings.weight")
    ]


def test_what_only_the_script_knows_is_not_refused(stored: StoredCheckpoint) -> None:
    mapped, errors, notes = planned(stored, ParameterMap(new=("mtp.*",)), mtp_num_layers=1)
    assert (mapped, errors) == (Mapped(), [])
    assert "not known offline" in notes[0]


def test_state_without_names_is_not_compared(checkpoints: Checkpoints) -> None:
    stored = open_checkpoint(checkpoints.phase_1(Layout(), 1)[0])
    assert planned(stored, num_layers=4) == (Mapped(), [], [])


def test_a_map_for_state_without_names_is_refused_by_the_plan(checkpoints: Checkpoints) -> None:
    directory, _ = checkpoints.phase_1(Layout(), 1)
    found = forecast(directory, [*words(FIRST), "--selective-new-parameters", "decoder.*"])
    assert "does not name parameters" in str(found.errors)
