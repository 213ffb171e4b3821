"""Count NaN and infinite moments, then refuse, reset or keep them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..base import ranks
from ..base.text import first_of
from ..checkpoint.state import MOMENT_KEYS
from ..errors import CheckpointError
from .moments import Survey, survey
from .parameters import held_parameters, names_of
from .scaled import values
from .steps import is_adam, is_hybrid


def count_nonfinite(optimizer: Any) -> tuple[int, tuple[float, float] | None]:
    """Count the non-finite elements of this rank's moments, in one read-only pass.

    Returns:
        Number of NaN and infinite elements; Euclidean norms of exp_avg and exp_avg_sq, or None if
        the optimizer has no moments that can be reached.
    """
    found = _survey(optimizer)
    return (0, None) if found is None else (sum(found[1].nonfinite), found[1].norms)


def handle_nonfinite(
    optimizer: Any,
    model_chunks: Sequence[Any],
    choice: str,
    bad: Mapping[str, int] | None = None,
) -> str:
    """Refuse, reset or keep NaN and infinite moments; collective, called if some rank has any.

    Args:
        optimizer: A Megatron optimizer with state.
        model_chunks: Its model, for the names of its parameters.
        choice: ``error``, ``reset`` or ``keep`` (`ResumePolicy.nonfinite`).
        bad: Parameters on this rank -> number of non-finite elements, if known.

    Returns:
        A phrase for the report.

    Raises:
        CheckpointError: The choice is ``error``; on every rank with a non-finite element.
        AgreementError: The choice is ``error``; on the other ranks, with the messages.
    """
    if bad is None:
        names = names_of(optimizer, model_chunks)
        bad = {names.get(i, "unnamed"): n for i, n in _nonfinite(optimizer).items() if n}
    error = None
    if bad and choice == "error":
        listing = first_of([f"{name}: {n}" for name, n in bad.items()])
        error = CheckpointError(
            f"the checkpoint's moments are not finite (elements of exp_avg and exp_avg_sq): "
            f"{listing}. Load an earlier checkpoint, or pass --selective-nonfinite reset to "
            "set these elements to 0, or keep to leave them as they are"
        )
    ranks.stop_together("counting non-finite moments", error)
    if choice == "reset":
        _reset_nonfinite(optimizer)
    return f"not finite in the checkpoint: {'reset to 0' if choice == 'reset' else 'kept'}"


def _survey(optimizer: Any) -> tuple[list[torch.Tensor], Survey] | None:
    """Survey all moments of an optimizer; returns the keys of its state too."""
    inner = optimizer.optimizer
    if inner is None or not is_adam(inner) or is_hybrid(inner):
        return None
    keys = [k for k, state in inner.state.items() if all(m in state for m in MOMENT_KEYS)]
    return keys, survey(inner, keys)


def _nonfinite(optimizer: Any) -> dict[int, int]:
    """Map the id of each state key to its number of non-finite elements."""
    found = _survey(optimizer)
    return (
        {}
        if found is None
        else {id(k): n for k, n in zip(found[0], found[1].nonfinite, strict=True)}
    )


@torch.no_grad()
def _reset_nonfinite(optimizer: Any) -> None:
    bad = {i for i, n in _nonfinite(optimizer).items() if n}
    inner = optimizer.optimizer
    for held in held_parameters(optimizer):
        if id(held.key) not in bad:
            continue
        moments = {k: values(inner, held.key, k) for k in MOMENT_KEYS}
        wrong = ~(moments["exp_avg"].isfinite() & moments["exp_avg_sq"].isfinite())
        for key, found in moments.items():
            found.masked_fill_(wrong, 0.0)
            if found.data_ptr() != inner.state[held.key][key].data_ptr():
                inner.set_scaled_state(held.key, key, found)
