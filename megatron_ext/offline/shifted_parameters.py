"""List what each model-parallel rank held, and read it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..base.text import first_of
from ..checkpoint import names
from ..checkpoint.state_keys import state_dtype
from ..checkpoint.store import Store
from ..checkpoint.stored import StoredCheckpoint
from ..errors import CheckpointError
from .master_proof import masters_of
from .shifted_held import Held, is_expert
from .shifted_order import in_order
from .shifted_ranks import Ranks
from .slabs import Piece, pieces_of, whole, writer_of

MASTER = "param"
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


class Reader:
    """Reads what a rank held, one tensor at a time.

    Args:
        stored: A checkpoint with state by parameter.
    """

    def __init__(self, stored: StoredCheckpoint) -> None:
        assert stored.store is not None
        self.store: Store = stored.store
        _require_floats(stored)
        #: Key of the weights -> state, such as ``exp_avg`` -> its key.
        self.states: dict[str, dict[str, str]] = {w: {} for w in masters_of(stored).values()}
        for key, shape in stored.tensors.items():
            split = None if shape is None else names.kind_and_key(key)
            if split is None or split[0] == names.WEIGHTS or split[1] not in self.states:
                continue
            if shape == stored.tensors[split[1]]:
                kind = MASTER if split[0] == names.MASTER else split[0]
                self.states[split[1]][kind] = key
        keys = [key for states in self.states.values() for key in states.values()]
        listed = pieces_of(self.store, [*keys, *self.states])
        self._pieces = {(p.key, p.offset): p for pieces in listed.values() for p in pieces}
        self.masters: list[Piece] = [p for s in self.states.values() for p in listed[s[MASTER]]]

    def weights(self, held: Held) -> torch.Tensor:
        """Read the model's weights of a parameter, flat."""
        return self._read(held, held.key)

    def state(self, held: Held, state: str) -> torch.Tensor:
        """Read what is stored as a parameter's state, flat."""
        return self._read(held, self.states[held.key][state])

    def rounded(self, held: Held) -> torch.Tensor:
        """Read what is stored as a parameter's master weights, in the dtype of the weights."""
        return self.state(held, MASTER).to(held.dtype)

    def dtype(self, held: Held, state: str) -> torch.dtype:
        """Return the dtype of what is stored as a parameter's state."""
        entry = self.store.index.state_dict_metadata[self.states[held.key][state]]
        dtype: torch.dtype = state_dtype(entry)
        return dtype

    def _read(self, held: Held, key: str) -> torch.Tensor:
        return torch.cat([whole(self.store, self._piece(key, *piece)) for piece in held.pieces])

    def _piece(self, key: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Piece:
        found = self._pieces.get((key, offset))
        if found is None or found.shape != shape:
            raise CheckpointError(
                f"{self.store.directory}: {key}: expected a piece of shape {shape} at {offset}, as "
                f"the master weights have, found {found and found.shape}. Megatron stores a "
                "parameter's weights and state in equal pieces: restore the checkpoint"
            )
        return found


def buffers_of(stored: StoredCheckpoint, reader: Reader) -> list[list[Held]]:
    """List the buffers of the run that saved a checkpoint, each in its order.

    Args:
        stored: The checkpoint.
        reader: Its reader.
    """
    ranks = Ranks(stored.args)
    style = names.Style.of_arguments(stored.args)
    key_of = {states[MASTER]: weight for weight, states in reader.states.items()}
    entries = reader.store.index.state_dict_metadata
    pieces: dict[Any, dict[_Id, list[Piece]]] = defaultdict(dict)
    writers: dict[Any, set[str]] = defaultdict(set)
    for piece in reader.masters:
        key, writer = key_of[piece.key], writer_of(piece)
        group = ranks.group_of(writer, is_expert(key))
        lead = piece.offset[: names.leading_axes(key)]
        pieces[group].setdefault((key, lead), []).append(piece)
        writers[group].add(writer)
    groups: list[list[Held]] = []
    for group, parameters in pieces.items():
        mine = [
            Held(
                key,
                lead,
                names.name_of(key, lead, style),
                tuple(sorted((p.offset, p.shape) for p in found)),
                state_dtype(entries[key]),
            )
            for (key, lead), found in parameters.items()
        ]
        groups.append(in_order(mine, style, len(writers[group]) == 1, ranks))
    return [buffer for group in _completed(groups) for buffer in _cut(group)]


def _require_floats(stored: StoredCheckpoint) -> None:
    assert stored.store is not None
    entries = stored.store.index.state_dict_metadata
    others = {
        w: d for w in masters_of(stored).values() if (d := state_dtype(entries[w])) not in _FLOATS
    }
    if others:
        found = first_of([f"{key}: {dtype}" for key, dtype in others.items()])
        raise CheckpointError(
            f"{stored.directory}: expected weights of bfloat16, float16 or float32, to which their "
            f"master weights are rounded, found {found}. Nothing proves where the "
            "state of these is: restore the checkpoint or load another iteration"
        )


_Id = tuple[str, tuple[int, ...]]


def _completed(groups: Sequence[list[Held]]) -> list[list[Held]]:
    """Add what a rank held but another one has stored: the same on all tensor-parallel ranks."""
    holders: dict[_Id, list[int]] = defaultdict(list)
    for number, group in enumerate(groups):
        for held in group:
            holders[held.key, held.lead].append(number)
    out = []
    for group in groups:
        alike = {n for held in group for n in holders[held.key, held.lead]}
        fullest = groups[max(sorted(alike), key=lambda n: len(groups[n]))]
        mine = {(held.key, held.lead): held for held in group}
        whole_group = [
            mine.pop((held.key, held.lead), replace(held, stored=False))
            for held in fullest
            if (held.key, held.lead) in mine or not is_expert(held.key)
        ]
        out.append(whole_group + list(mine.values()))
    return out


def _cut(group: Iterable[Held]) -> list[list[Held]]:
    buffers: dict[Any, list[Held]] = defaultdict(list)
    for held in group:
        buffers[held.buffer, held.dtype].append(held)
    return list(buffers.values())
