"""A vocabulary of another size with stock Megatron; runs where this package cannot be imported."""

from __future__ import annotations

from typing import Any

import torch

from . import harness
from .harness import Hyper, Layout
from .unsharded import gather, weights

_VOCABULARY = ("word_embeddings.weight", "output_layer.weight")


def phase_1(layout: Layout, hyper: Hyper, steps: int, directory: str) -> dict[str, Any]:
    """Train and save; what was saved, unsharded."""
    run = harness.build(layout, hyper)
    harness.train(run, steps)
    harness.save(run, directory)
    return _result(run)


def fresh(layout: Layout, hyper: Hyper) -> dict[str, Any]:
    """What a model of this size is initialised with."""
    return _result(harness.build(layout, hyper))


def loaded(layout: Layout, hyper: Hyper, directory: str) -> dict[str, Any]:
    """What stock makes of a checkpoint with another number of rows."""
    run = harness.build(layout, hyper)
    harness.load(run, directory)
    return _result(run)


def corrected(
    layout: Layout, hyper: Hyper, directory: str, saved_rows: int, steps: int
) -> dict[str, Any]:
    """Load with stock, write the initial values into the new rows by hand, train."""
    run = harness.build(layout, hyper)
    before = [t.detach().clone() for _, t, _, _ in _pairs(run)]
    harness.load(run, directory)
    with torch.no_grad():
        for (_, tensor, begin, end), initial in zip(_pairs(run), before, strict=True):
            first = _first_new_element(run, saved_rows)
            at = min(max(first - begin, 0), end - begin)
            tensor.view(-1)[at:] = initial.view(-1)[at:]
    harness.train(run, steps)
    return {**_result(run), "losses": run.losses}


def _first_new_element(run: harness.Run, saved_rows: int) -> int:
    """In this rank's flattened part of the embedding or the output layer."""
    from megatron.core import parallel_state

    rows = run.layout.vocab // run.layout.tp
    first = saved_rows - parallel_state.get_tensor_model_parallel_rank() * rows
    return min(max(first, 0), rows) * run.layout.hidden


def _pairs(run: harness.Run) -> list[tuple[str, torch.Tensor, int, int]]:
    """Weights and masters of embedding and output layer, and which elements of a rank's part."""
    from .unsharded import _held

    found = []
    names = {}
    for chunk in run.model:
        for name, param in harness.unwrapped(chunk).named_parameters():
            if name.endswith(_VOCABULARY):
                names[id(param)] = name
                found.append((name, param.data, 0, param.numel()))
    for optimizer in getattr(run.optimizer, "chained_optimizers", [run.optimizer]):
        for model_param, main, begin, end in _held(optimizer):
            if id(model_param) in names:
                found.append((names[id(model_param)], main.data, begin, end))
    return found


def _result(run: harness.Run) -> dict[str, Any]:
    return {"state": gather(run), "weights": weights(run)}
