"""What the ranks of tests/base/test_agree.py run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megatron_ext.base import ranks as agreement
from megatron_ext.errors import MegatronExtError, PlanError


def agree(
    digests: list[str],
    errors: dict[int, str] | None = None,
    what: str = "resume of X",
    facts: list[dict[str, str]] | None = None,
) -> dict[str, Any]:
    """`base.ranks.agree` with this rank's digest and error: outcome and collectives."""
    rank = dist.get_rank()
    known = None if facts is None else lambda: facts[rank]
    return _outcome(
        errors or {}, lambda error: agreement.agree(what, digests[rank], error, facts=known)
    )


def await_everyone(seconds: float, absent: list[int]) -> tuple[str, str] | None:
    """`base.ranks.await_everyone`; ranks that are `absent` do not call it."""
    if dist.get_rank() in absent:
        return None
    try:
        agreement.await_everyone("meeting", seconds)
    except MegatronExtError as e:
        return type(e).__name__, str(e)
    return None


def sum_without_float64(values: list[list[float]]) -> tuple[list[float], list[str]]:
    """`base.ranks.sum_over_ranks` on a device whose backend is not known to reduce float64."""
    before, dist.get_backend_config = dist.get_backend_config, lambda: "cpu:hccl"
    try:
        with Collectives() as collectives:
            tensor = torch.tensor(values[dist.get_rank()], dtype=torch.float64)
            agreement.sum_over_ranks(tensor)
        return tensor.tolist(), [name for name, _ in collectives.calls]
    finally:
        dist.get_backend_config = before


def stop_together(errors: dict[int, str], planning: tuple[int, ...] = ()) -> dict[str, Any]:
    """`base.ranks.stop_together` with this rank's error; `planning` ranks call `agree` instead."""

    def call(error: PlanError | None) -> None:
        if dist.get_rank() in planning:
            agreement.agree("planning", "a1" * 32, error)
        else:
            agreement.stop_together("reading X", error)

    return _outcome(errors, call)


def _outcome(errors: dict[int, str], call: Callable[[PlanError | None], object]) -> dict[str, Any]:
    """What a call raises with this rank's error, and its collectives."""
    rank = dist.get_rank()
    message = errors.get(rank)
    error = None if message is None else PlanError(message)
    with Collectives() as collectives:
        try:
            call(error)
            outcome, same = None, False
        except MegatronExtError as e:
            outcome, same = (type(e).__name__, str(e)), e is error
    # No rank is left behind in a collective of its own: the next one is in step again.
    after = agreement.total([rank, 1])
    return {"raised": outcome, "own": same, "calls": collectives.calls, "after": after}


def total() -> dict[str, Any]:
    with Collectives() as collectives:
        values = agreement.total([dist.get_rank() + 1, 10, -dist.get_rank(), 2**40])
    return {"values": values, "calls": collectives.calls}


class Collectives:
    """Counts what goes through torch.distributed: per call its name and bytes, if a tensor."""

    NAMES = ("all_reduce", "all_gather_object", "all_gather", "broadcast", "barrier")

    def __enter__(self) -> Collectives:
        self.calls: list[tuple[str, int | None]] = []
        self._before = {name: getattr(dist, name) for name in self.NAMES}
        for name, function in self._before.items():
            setattr(dist, name, self._counting(name, function))
        return self

    def __exit__(self, *_: Any) -> None:
        for name, function in self._before.items():
            setattr(dist, name, function)

    def _counting(self, name: str, function: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            first = args[0] if args else None
            size = first.numel() * first.element_size() if torch.is_tensor(first) else None
            self.calls.append((name, size))
            return function(*args, **kwargs)

        return counted
