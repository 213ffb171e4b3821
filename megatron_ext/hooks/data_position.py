"""Wrap the functions that request data, so that a phase has its own data position.

This module does not change a run whose data position follows from its iteration.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from ..host.arguments import global_args
from ..policy.counters import Counters, ramp_of, samples_needed
from ..resume.session import Resume, current


def loaders(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``build_train_valid_test_data_loaders`` (training/training.py:4510, 0.19.2).

    If the data position is 0 at a later iteration, stock assumes an old checkpoint and computes the
    position from the iteration (line 4523); with ``--train-samples`` it asserts. The wrapper
    therefore sets the iteration to 0 for stock and restores it for the script's dataset provider.
    """

    @functools.wraps(original)
    def build(provider: Any, *rest: Any, **kwargs: Any) -> Any:
        resume, args = current.resumed, global_args()
        if resume is None or not _own_data_position(resume):
            return original(provider, *rest, **kwargs)
        iteration = args.iteration

        @functools.wraps(provider)
        def provide(*a: Any, **k: Any) -> Any:
            with _iteration(args, iteration):
                return provider(*a, **k)

        with _iteration(args, 0):
            return original(provide, *rest, **kwargs)

    return build


def sample_counts(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``get_train_valid_test_num_samples`` (training/training.py:4466, 0.19.2).

    Stock requests the samples of all iterations at the current batch size. These are too few for a
    run that has consumed more samples than its iterations at that batch size.
    """

    @functools.wraps(original)
    def count(*rest: Any, **kwargs: Any) -> Any:
        train, valid, test = original(*rest, **kwargs)
        resume, args = current.resumed, global_args()
        if resume is None or resume.counters is None or ramp_of(args) is not None:
            return train, valid, test
        if args.phase_transition_iterations or not args.train_iters:
            return train, valid, test
        now = resume.counters[1]
        if now.consumed_train_samples == now.iteration * args.global_batch_size:
            return train, valid, test
        needed = samples_needed(now, args.train_iters, args.global_batch_size)
        return max(train, needed), _valid_needed(args, now, valid), test

    return count


def _own_data_position(resume: Resume) -> bool:
    """Whether the phase has a data position that does not follow from its iteration."""
    mark = None if resume.phase is None else resume.phase.mark
    return resume.counters is not None and mark is not None and mark.offset != 0


def _valid_needed(args: Any, now: Counters, valid: int | None) -> int | None:
    if valid is None or not args.eval_iters or not args.eval_interval:
        return valid
    size = getattr(args, "eval_global_batch_size", args.global_batch_size)
    left = args.train_iters // args.eval_interval + 1 - now.iteration // args.eval_interval
    return max(valid, now.consumed_valid_samples + left * args.eval_iters * size)


@contextlib.contextmanager
def _iteration(args: Any, value: int) -> Iterator[None]:
    before, args.iteration = args.iteration, value
    try:
        yield
    finally:
        args.iteration = before
