"""Name the numbers of a resume report for TensorBoard and W&B. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

#: Prefix of every name.
PREFIX = "megatron_ext"
#: Keys of a param_group that are numbers. betas is handled separately.
_OF_GROUP = ("max_lr", "min_lr", "start_wd", "end_wd", "eps")


def scalars(document: Mapping[str, Any]) -> dict[str, float]:
    """Collect the numbers from which a resumed run starts, by name.

    Names are ``megatron_ext/warnings``, ``megatron_ext/counter/<name>``,
    ``megatron_ext/optimizer_<n>/<name>`` and ``megatron_ext/optimizer_<n>/group_<i>/<name>``.
    ``lr`` and ``weight_decay`` of a group are the first resumed step's. The RMS of a moment is over
    all its elements on all ranks.

    Args:
        document: The result of `ResumeReport.to_json`.
    """
    return {f"{PREFIX}/{name}": float(value) for name, value in _named(document)}


def _named(document: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    optimizers = document["optimizers"]
    yield "warnings", sum(len(o["warnings"]) for o in optimizers)
    for name, counter in (document["counters"] or {}).items():
        if counter["value"] is not None:
            yield f"counter/{name}", counter["value"]
    for number, optimizer in enumerate(optimizers):
        for name, value in _of_optimizer(optimizer):
            yield f"optimizer_{number}/{name}", value
    for first in (document["scheduler"] or {}).get("first_step", ()):
        for name in ("lr", "weight_decay"):
            yield f"optimizer_{first['optimizer']}/group_{first['group']}/{name}", first[name]


def _of_optimizer(optimizer: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    if optimizer["step"]["value"] is not None:
        yield "step", optimizer["step"]["value"]
    for name in ("loss_scale", "clip_grad"):
        if optimizer[name] is not None:
            yield name, optimizer[name]["value"]
    for key, elements in optimizer["loaded"]["elements"].items():
        yield f"{key}/loaded_elements", elements
    for key, state in (optimizer["moments"] or {"state": {}})["state"].items():
        for name, value in state.items():
            if value is not None:
                yield f"{key}/{name}", value
    for group in optimizer["groups"]:
        for name, value in _of_group(group["keys"]):
            yield f"group_{group['index']}/{name}", value


def _of_group(keys: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name in _OF_GROUP:
        if name in keys and keys[name]["value"] is not None:
            yield name, keys[name]["value"]
    if "betas" in keys:
        for number, beta in enumerate(keys["betas"]["value"], 1):
            yield f"beta{number}", beta
