"""What stock Megatron does with the state that a resume has to have, put in place by hand.

This file does not import megatron_ext, and the processes it runs in cannot.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from . import harness, oracle
from .harness import Hyper, Layout
from .unsharded import State, gather, held_values


def continued(
    layout: Layout, first: Hyper, second: Hyper, steps: int, state: State | None, more: int
) -> dict[str, Any]:
    """Train phase 1, write moments into the state, and go on with phase 2's hyperparameters."""
    run = harness.build(layout, first)
    harness.train(run, steps)
    if state is not None:
        for inner, key, values in held_values(run, state):
            for name in ("exp_avg", "exp_avg_sq"):
                _write(inner, key, name, torch.from_numpy(values[name].copy()))
    return {**oracle.second_phase(run, second, more), "state": gather(run)}


def _write(inner: Any, key: torch.Tensor, name: str, values: torch.Tensor) -> None:
    if values.any():
        inner.set_scaled_state(key, name, values)
    else:
        inner._initialize_state(key, name, True)  # of zeros set_scaled_state makes NaN in fp8


def damaged(
    layout: Layout, hyper: Hyper, steps: int, directory: str, changes: dict[str, dict[str, float]]
) -> dict[str, Any]:
    """Train and save with other numbers as the first element of a parameter's moments.

    A change is the name of a parameter, the moment and its number. The checkpoint has fp32 values,
    so that the others are as they were.
    """
    run = harness.build(layout, hyper)
    harness.train(run, steps)
    before = gather(run)
    (inner,) = harness.inner_optimizers(run.optimizer)
    original = inner.get_unscaled_state
    numbers = {
        key: of_it
        for _, key, values in held_values(run, before)
        for name, of_it in changes.items()
        if np.array_equal(values["param"], before[name]["param"].reshape(-1))
    }

    def read(param: torch.Tensor, name: str, *args: Any, **kwargs: Any) -> torch.Tensor:
        found: torch.Tensor = original(param, name, *args, **kwargs)
        if name in numbers.get(param, {}):
            found = found.clone()
            found.view(-1)[0] = numbers[param][name]
        return found

    inner.get_unscaled_state = read
    harness.save(run, directory)
    return {"state": before, "changed": len(numbers)}


def with_other_weights(layout: Layout, hyper: Hyper, steps: int, directory: str) -> None:
    """Train, and save with another weight in the output layer than its master weight."""
    run = harness.build(layout, hyper)
    harness.train(run, steps)
    for chunk in run.model:
        with torch.no_grad():
            harness.unwrapped(chunk).output_layer.weight.view(-1)[3] += 1.0
    harness.save(run, directory)


def saved(layout: Layout, hyper: Hyper, steps: int, directory: str) -> None:
    """Train and save."""
    run = harness.build(layout, hyper)
    harness.train(run, steps)
    harness.save(run, directory)


def of_zeros(layout: Layout, hyper: Hyper, steps: int, directory: str, unused: str) -> State:
    """Save moments that are all zero.

    Args:
        layout: The run's layout.
        hyper: Its hyperparameters.
        steps: So many steps are made in which one parameter has no gradient; 0 for the state that
            FusedAdam begins with.
        directory: For the checkpoint.
        unused: That parameter.
    """
    run = harness.build(layout, hyper)
    for chunk in run.model:
        for name, param in harness.unwrapped(chunk).named_parameters():
            if name == unused:
                param.register_hook(torch.zeros_like)
    for inner in harness.inner_optimizers(run.optimizer) if not steps else ():
        for group in inner.param_groups:
            group["step"] = 0
            for param in group["params"]:
                inner.initialize_state(param, inner.store_param_remainders)
    harness.train(run, steps)
    harness.save(run, directory)
    return gather(run)
