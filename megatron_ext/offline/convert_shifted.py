"""Put back the state that stock Megatron has stored shifted, as ``fully_reshardable``.

The state is there, but under the names of other parameters (`.shifted_layout`). The weights of the
model in the same checkpoint are right, and tell where (`.shifted_proof`). Elements that fall into
the padding that the save has counted are stored nowhere: their moments become 0, and their master
weights the model's weights.
"""

from __future__ import annotations

import io
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..base.text import first_of
from ..checkpoint.store import INDEX
from ..checkpoint.stored import StoredCheckpoint, open_checkpoint
from ..errors import CheckpointError
from . import master_proof
from .new_checkpoint import TensorWriter, Written, copy_others
from .shifted_held import Held
from .shifted_layout import Part
from .shifted_parameters import MASTER, Reader, buffers_of
from .shifted_proof import Found, find
from .shifted_ranks import Ranks
from .shifted_sources import Source, sources

SOURCE = "fully_reshardable"


class _Plan(NamedTuple):
    """A buffer with, for each parameter, where its elements are stored; None if not certain."""

    buffer: Sequence[Held]
    sources: Sequence[list[Source] | None]


def needed(stored: StoredCheckpoint) -> bool:
    """Whether some stored master weights are not the model's weights, not even rounded twice.

    Args:
        stored: A checkpoint with state by parameter.

    Raises:
        CheckpointError: A file is damaged, or the master weights are remainders.
    """
    found = master_proof.prove(stored)
    if found.remainders:
        raise CheckpointError(
            f"{stored.directory}: expected master weights, which tell whether the state was stored "
            f"shifted, found {found.remainders} whole numbers: {master_proof.ONLY_HALF}. "
            "megatron_ext.SelectiveAdam loads them; saved again by it they are master weights"
        )
    wrong = sum(d.elements for d in found.differences)
    return wrong > 0 and wrong != found.rounded_twice


def write(stored: StoredCheckpoint, directory: Path) -> Written:
    """Write the files of the repaired iteration.

    Args:
        stored: The checkpoint, with state by parameter.
        directory: The new directory of the iteration.

    Raises:
        CheckpointError: The checkpoint is damaged, or its state is wrong in another way.
    """
    reader = Reader(stored)
    store, ranks = reader.store, Ranks(stored.args)
    found = [find(reader, buffer, ranks) for buffer in buffers_of(stored, reader)]
    _require_explained(stored, reader, found)
    plans = [_plan(f) for f in found if not f.in_place]
    infos: dict[str, list[tuple[tuple[int, ...] | None, Any]]] = defaultdict(list)
    for index, info in store.index.storage_data.items():
        infos[index.fqn].append((index.offset, info))
    files = {info.relative_path for some in infos.values() for _, info in some}
    writer = TensorWriter(directory, max((stored.directory / f).stat().st_size for f in files))
    written: dict[str, set[tuple[int, ...]]] = defaultdict(set)
    for plan in plans:
        for state in _states(reader, plan):
            for held, values in _restored(reader, plan, state):
                _add(writer, held, reader.states[held.key][state], values, written)
    for key, entry in store.index.state_dict_metadata.items():
        rest = [(offset, i) for offset, i in infos[key] if tuple(offset or ()) not in written[key]]
        writer.copy(store, key, entry, rest)
    writer.finish()
    copy_others(stored.directory, directory, {*files, INDEX})
    if master_proof.prove(open_checkpoint(directory)).differences:
        raise CheckpointError(
            f"the copy of {stored.directory} has master weights that are not the model's weights: "
            "a fault of megatron_ext. Nothing was left behind; please report it"
        )
    reshaped = sum(bool(offsets) for offsets in written.values())
    copied = len(store.index.state_dict_metadata) - reshaped
    lost, reset = _losses(plans)
    return Written(reshaped, copied, writer.size, lost=lost, reset=reset)


def _require_explained(stored: StoredCheckpoint, reader: Reader, found: Sequence[Found]) -> None:
    unexplained = [f for f in found if not f.in_place and not f.layouts]
    if not unexplained:
        return
    wrong: Counter[str] = Counter()
    for one in unexplained:
        wrong.update(one.wrong)
    named = [f"{name}: {count}" for name, count in wrong.items()]
    raise CheckpointError(
        f"{stored.directory}: expected master weights that are the model's weights, rounded to "
        "their dtype, in their own place or where stock Megatron 0.16 to 0.19 stores them if "
        f"several buckets are padded. Elements that differ: {first_of(named)}. The weights were "
        "edited after the save, a file is damaged, the run had --main-params-dtype fp16, whose "
        "master weights are rounded on their own, or the order of the parameters in the run's "
        "buffers is not the one of Megatron's GPT. If only the weights were edited, resume with "
        "--selective-master-weights model; otherwise restore the checkpoint or convert another "
        "iteration"
    )


def _plan(found: Found) -> _Plan:
    parts = [Part(h.elements, stored=h.stored) for h in found.buffer]
    of_each = [sources(parts, places) for places in found.layouts]
    same = [
        ways[0] if all(way == ways[0] for way in ways) else None
        for ways in zip(*of_each, strict=True)
    ]
    return _Plan(found.buffer, same)


def _states(reader: Reader, plan: _Plan) -> list[str]:
    return sorted({state for held in plan.buffer for state in reader.states[held.key]})


def _restored(reader: Reader, plan: _Plan, state: str) -> Iterator[tuple[Held, torch.Tensor]]:
    """Yield each parameter that the rank has stored with its own state."""
    windows: dict[int, torch.Tensor] = {}
    for held, found in zip(plan.buffer, plan.sources, strict=True):
        if not held.stored:
            continue
        values = torch.zeros(held.elements, dtype=reader.dtype(held, state))
        if state == MASTER:
            values.copy_(reader.weights(held))
        if found:
            # Later parameters are stored later.
            windows = {n: w for n, w in windows.items() if n >= found[0].number}
        for source in found or ():
            if source.number not in windows:
                windows[source.number] = reader.state(plan.buffer[source.number], state)
            part = windows[source.number][source.begin : source.begin + source.elements]
            values[source.first : source.first + source.elements] = part
        yield held, values


def _add(
    writer: TensorWriter,
    held: Held,
    key: str,
    values: torch.Tensor,
    written: dict[str, set[tuple[int, ...]]],
) -> None:
    sizes = [torch.Size(shape).numel() for _, shape in held.pieces]
    for (offset, shape), part in zip(held.pieces, values.split(sizes), strict=True):
        buffer = io.BytesIO()
        torch.save(part.clone().view(shape), buffer)
        writer.add(key, offset, buffer.getbuffer())
        written[key].add(offset)


def _losses(plans: Sequence[_Plan]) -> tuple[tuple[tuple[str, int], ...], tuple[str, ...]]:
    """Return what was stored nowhere, and of which parameters the place is not certain."""
    lost: Counter[str] = Counter()
    reset: dict[str, None] = {}
    for plan in plans:
        for held, found in zip(plan.buffer, plan.sources, strict=True):
            if held.stored and found is None:
                reset[held.name] = None
            elif held.stored and found is not None:
                lost[held.name] += held.elements - sum(source.elements for source in found)
    return tuple((name, count) for name, count in lost.items() if count), tuple(reset)
