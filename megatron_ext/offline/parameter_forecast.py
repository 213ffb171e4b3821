"""Forecast where the state of every parameter comes from, from metadata and arguments.

The parameters of the resumed model are those of the checkpoint, changed as far as arguments tell:
the number of layers, tied embeddings, MTP. Only the script knows other modules and what is frozen.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from ..checkpoint.names import Style, kind_and_key, leading_axes
from ..checkpoint.stored import StoredCheckpoint
from ..plan.mapped import Mapped, Wanted
from ..plan.parameter_map import plan_map
from ..plan.preflight_parameters import is_by_position
from ..policy.policy import ResumePolicy
from .findings import Findings

_EMBEDDING, _OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
_NUMBERED = re.compile(r"decoder\.layers\.(\d+)\.")
#: What the comparison does not know.
_NOTE = (
    "parameters: compared as far as arguments tell (--num-layers, tied embeddings, MTP); what a "
    "script freezes or adds is not known offline"
)


def forecast_parameters(
    stored: StoredCheckpoint, before: Any, now: Any, policy: ResumePolicy, found: Findings
) -> Mapped:
    """Plan the sources of the resumed model's parameters.

    Args:
        stored: The checkpoint. Its index is read, but no tensor.
        before: Megatron's arguments of the checkpoint's run.
        now: Those of the resumed run.
        policy: The policy of the resume.
        found: Receives the error for which the run would be refused, and a note.
    """
    if is_by_position(stored):
        return Mapped()
    style = Style.of_arguments(vars(now))
    wanted = list(_wanted(stored.tensors, before, now))
    # A pattern may match what only the script adds.
    planned = found.tried(
        lambda: plan_map(
            policy.parameters, wanted, stored.tensors, style, rules=policy.rules, strict=False
        )
    )
    mapped = planned or Mapped()
    if policy.parameters or mapped != Mapped():
        found.notes.append(_NOTE)
    return mapped


def _wanted(
    shapes: Mapping[str, tuple[int, ...] | None], before: Any, now: Any
) -> Iterator[Wanted]:
    def changed(name: str) -> tuple[Any, Any] | None:
        both = getattr(before, name, None), getattr(now, name, None)
        return both if both[0] != both[1] else None

    layers = None if changed("num_layers") is None else now.num_layers
    tie = changed("untie_embeddings_and_output_weights")
    without_mtp = changed("mtp_num_layers") is not None and not now.mtp_num_layers
    for key, shape in shapes.items():
        split = kind_and_key(key) if shape is not None else None
        if split is None or shape is None or "/" in key:
            continue
        kind, model_key = split
        if model_key == _OUTPUT and tie is not None and not tie[1]:
            continue
        if model_key.startswith("mtp.") and without_mtp:
            continue
        one = _of_all_layers(kind, key, model_key, shape, layers)
        number = _NUMBERED.match(model_key)
        if number is None or layers is None or int(number[1]) < layers:
            yield one
        if number is not None and number[1] == "0":
            yield from _further_layers(one, shapes, layers)
        if model_key == _EMBEDDING and tie is not None and tie[1] and _OUTPUT not in shapes:
            prefix = key.removesuffix(_EMBEDDING)
            yield replace(one, key=prefix + _OUTPUT, base=_OUTPUT)


def _of_all_layers(
    kind: str, key: str, model_key: str, shape: tuple[int, ...], layers: int | None
) -> Wanted:
    count = min(leading_axes(model_key), len(shape))
    axes, own = shape[:count], shape[count:]
    if axes and layers is not None and model_key.startswith("decoder.layers."):
        axes = (layers, *axes[1:])
    leads = tuple(itertools.product(*map(range, axes)))
    vocabulary = model_key in (_EMBEDDING, _OUTPUT)
    return Wanted(kind, key, model_key, "", axes, own, vocabulary, leads)


def _further_layers(
    first: Wanted, shapes: Mapping[str, tuple[int, ...] | None], layers: int | None
) -> Iterator[Wanted]:
    """Yield the layers that are stored separately and that the checkpoint does not have."""
    for number in range(1, layers or 0):
        at = f"decoder.layers.{number}."
        key = _NUMBERED.sub(at, first.key, count=1)
        if key not in shapes:
            yield replace(first, key=key, base=_NUMBERED.sub(at, first.base, count=1))
