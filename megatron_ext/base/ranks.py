"""One small collective at load time, so that every rank goes on or every rank stops.

A rank that refuses a resume while the others go on leaves them hanging in the next collective.
`agree` is called once on every rank before anything is changed. It moves 40 bytes per rank,
whatever the number of ranks. Only when something is wrong, a second collective gathers the
messages.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from ..errors import AgreementError, MegatronExtError
from .text import MAX_NAMED, first_of

#: Bytes that one successful `agree` moves per rank: five int64.
BYTES_PER_RANK = 40

#: Stands in for the digest of a rank that compares nothing or has none.
_NO_DIGEST = "0" * 32

#: Stands in for the digest of a rank that has nothing to decide; it never is the largest.
_NOTHING = -(1 << 62)

#: Value of the last of the five integers if a rank failed; 1 stands for `flag`, 0 for neither.
_FAILED = 2

#: Backends that are known to reduce float64.
_FLOAT64 = ("gloo", "nccl")


def agree(
    what: str,
    digest: str | None,
    error: MegatronExtError | None = None,
    *,
    flag: bool = False,
    facts: Callable[[], Mapping[str, str]] | None = None,
) -> bool:
    """Compare a digest over all ranks and raise on every rank if it differs or a rank failed.

    Collective over the default process group: every rank has to call it. Without an initialised
    process group it only raises `error`.

    Args:
        what: What is agreed on, for the message.
        digest: Hex string of at least 32 digits that identifies this rank's decisions; None if it
            has nothing to decide.
        error: Why this rank cannot go on, or None.
        flag: A boolean that is combined by OR over the ranks in the same collective.
        facts: Names and values of what the digest is made of, for the message if it differs.

    Returns:
        Whether any rank has passed the flag.

    Raises:
        MegatronExtError: `error` itself, on the rank that has one.
        AgreementError: On the other ranks, with the failing ranks and their messages; or on all
            ranks if the digests differ, with what differs and the ranks in each camp.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        if error is not None:
            raise error
        return flag
    shown = digest if error is None else _NO_DIGEST
    # With MAX over (x, -x) all ranks hold the same x if and only if max(x) == -max(-x).
    parts = [_NOTHING] * 4
    if shown is not None:
        high, low = (int(shown[i : i + 15], 16) for i in (0, 15))
        parts = [high, -high, low, -low]
    probe = torch.tensor(
        [*parts, _FAILED if error is not None else int(flag)],
        dtype=torch.int64,
        device=device(),
    )
    dist.all_reduce(probe, op=dist.ReduceOp.MAX)
    high_max, high_min, low_max, low_min, most = probe.tolist()
    differ = high_max != _NOTHING and (high_max != -high_min or low_max != -low_min)
    if most == _FAILED or differ:
        _raise_on_every_rank(what, shown, error, facts)
    return bool(most)


def stop_together(what: str, error: MegatronExtError | None) -> None:
    """Raise on every rank if any rank has an error; the collective of `agree`, without a plan.

    Other ranks may be in `agree` at the same time, because both make the same collective calls.

    Args:
        what: What the ranks are doing, for the message.
        error: Why this rank cannot go on, or None.

    Raises:
        MegatronExtError: `error` itself, on the rank that has one.
        AgreementError: On the other ranks, with the failing ranks and their messages.
    """
    agree(what, _NO_DIGEST, error)


def agree_on(what: str, facts: Mapping[str, str], error: MegatronExtError | None = None) -> None:
    """Raise on every rank if a rank failed or the ranks have other values; as for `agree`.

    Args:
        what: The subject of the agreement, for the message.
        facts: Names and values, in the same order on every rank.
        error: This rank's error.

    Raises:
        MegatronExtError: As for `agree`.
    """
    digest = hashlib.sha256(repr(facts).encode()).hexdigest()
    agree(what, digest, error, facts=lambda: facts)


def await_everyone(what: str, seconds: float = 60.0) -> None:
    """Wait until every rank has come here; a collective without a limit would wait for hours.

    The ranks meet in the store of the process group: one key per rank, and a counter.

    Args:
        what: What the ranks are about to do; used once per process.
        seconds: The limit, after ranks that come at about the same time.

    Raises:
        AgreementError: Ranks did not come. The message names them.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    store, world = dist.distributed_c10d._get_default_store(), dist.get_world_size()
    keys = [f"megatron_ext/{what}/{rank}" for rank in range(world)]
    store.set(keys[dist.get_rank()], "here")
    counter = f"megatron_ext/{what}"
    here, end, pause = store.add(counter, 1), time.monotonic() + seconds, 0.01
    while here < world:
        if time.monotonic() > end:
            missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
            raise AgreementError(
                f"{what}: waited {seconds:g} s for {_ranks(missing)} of {world}. They run without "
                "--optimizer-class, or have stopped. Give every rank the same command"
            )
        time.sleep(pause)
        here, pause = store.add(counter, 0), min(1.0, 2 * pause)


def total(values: list[int]) -> list[int]:
    """Sum integers over all ranks (8 bytes per integer); collective over the default group."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return values
    summed = torch.tensor(values, dtype=torch.int64, device=device())
    dist.all_reduce(summed)
    return [int(v) for v in summed.tolist()]


def largest(values: list[int]) -> list[int]:
    """Take the largest of each integer over all ranks (8 bytes per integer); collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return values
    most = torch.tensor(values, dtype=torch.int64, device=device())
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return [int(v) for v in most.tolist()]


def gather(value: Any) -> list[Any]:
    """Gather a plain value from every rank, in rank order; collective over the default group."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def broadcast_from_rank_0(evaluate: Callable[[], bool]) -> bool:
    """Call `evaluate` on rank 0 and broadcast the boolean (collective, 8 bytes per rank).

    Args:
        evaluate: Called on rank 0 only. It must not raise.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return evaluate()
    answer = torch.zeros(1, dtype=torch.int64, device=device())
    if dist.get_rank() == 0:
        answer.fill_(int(evaluate()))
    dist.broadcast(answer, 0)
    return bool(answer.item())


def sum_over_ranks(tensor: torch.Tensor) -> None:
    """Add a tensor up over all ranks, in place; collective over the default group.

    gloo and NCCL, and RCCL under its name, reduce float64. Others need not (HCCL does not): for
    them the numbers are gathered and added up in rank order, the same sum on every rank.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    if tensor.dtype == torch.float64 and _backends().get(tensor.device.type) not in _FLOAT64:
        first, *others = (torch.tensor(v, dtype=tensor.dtype) for v in gather(tensor.tolist()))
        tensor.copy_(sum(others, first))
    else:
        dist.all_reduce(tensor)


def _raise_on_every_rank(
    what: str,
    digest: str | None,
    error: MegatronExtError | None,
    facts: Callable[[], Mapping[str, str]] | None,
) -> None:
    message = None if error is None else f"{type(error).__name__}: {error}"
    known = dict(facts()) if facts is not None and digest is not None and error is None else {}
    mine = (digest, message, known)
    everyone: list[tuple[str | None, str | None, dict[str, str]]]
    everyone = [mine] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    if error is not None:
        raise error
    failures = [(rank, message) for rank, (_, message, _) in enumerate(everyone) if message]
    if failures:
        lines = [f"  rank {rank}: {message}" for rank, message in failures[:MAX_NAMED]]
        more = len(failures) - MAX_NAMED
        lines += [f"  and {more} more ranks"] if more > 0 else []
        raise AgreementError(
            f"{what}: stopped because {len(failures)} of {len(everyone)} ranks refused:\n"
            + "\n".join(lines)
        )
    camps: dict[str, list[int]] = {}
    for rank, (other, _, _) in enumerate(everyone):
        if other is not None:
            camps.setdefault(other, []).append(rank)
    firsts = [everyone[ranks[0]][2] for ranks in camps.values()]
    lines = _differences(firsts, list(camps.values())) or [
        f"  {_ranks(ranks)}: plan {d[:12]}" for d, ranks in camps.items()
    ]
    raise AgreementError(
        f"{what}: the ranks made {len(camps)} different plans:\n"
        + "\n".join(lines)
        + "\nGive every rank the same arguments, files and checkpoint"
    )


def _differences(facts: Sequence[Mapping[str, str]], camps: Sequence[list[int]]) -> list[str]:
    """Say which facts differ between the camps, with the value of each."""
    lines = []
    for name in dict.fromkeys(name for known in facts for name in known):
        values: dict[str, list[int]] = {}
        for known, ranks in zip(facts, camps, strict=True):
            values.setdefault(known.get(name, "absent"), []).extend(ranks)
        if len(values) > 1:
            said = ", ".join(f"{value} on {_ranks(ranks)}" for value, ranks in values.items())
            lines.append(f"  {name}: {said}")
    more = len(lines) - MAX_NAMED
    return [*lines[:MAX_NAMED], *([f"  and {more} more"] if more > 0 else [])]


def _ranks(ranks: list[int]) -> str:
    numbers = first_of([str(rank) for rank in sorted(ranks)])
    return f"rank{'s' if len(ranks) > 1 else ''} {numbers}"


def device() -> torch.device:
    """Device on which the default group's collectives expect their tensors.

    It is the current accelerator if the group has a backend of its own for it (NCCL, RCCL, HCCL,
    XCCL), and the CPU if one backend serves both, as gloo does.
    """
    backends, accelerator = _backends(), torch.accelerator.current_accelerator()
    kind = accelerator.type if accelerator and torch.accelerator.is_available() else "cpu"
    if backends.get(kind) in (None, backends.get("cpu")):
        return torch.device("cpu")
    return torch.device(kind, torch.get_device_module(kind).current_device())


def _backends() -> dict[str, str]:
    """Return the default group's backend for each kind of device."""
    pairs = (part.split(":") for part in dist.get_backend_config().split(","))
    return {kind: name for kind, name in pairs}
