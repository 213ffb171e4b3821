"""Convert optimizer state by bucket, ``dp_reshardable``, to state by parameter.

Such a checkpoint names buckets, not parameters. Its model weights are stored by name, though, and
are the master weights rounded: `.bucket_proof` finds them in the buckets. Each piece of a weight,
which is what one rank held of it, becomes a piece of the same place and shape of
``optimizer.state.param.NAME`` and so on (core/optimizer/distrib_optimizer.py:1747-1814, 0.19.2).
"""

from __future__ import annotations

import functools
import io
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import torch

from ..base.text import first_of
from ..checkpoint.names import Style
from ..checkpoint.store import COMMON, COMMON_KEY, INDEX, GroupsKey, Store
from ..checkpoint.stored import StoredCheckpoint
from ..errors import CheckpointError
from .bucket_places import Places, find
from .bucket_reading import Reader, buckets_of, weights_of
from .bucket_weights import Weights, fingerprint
from .common_state import plain, with_values
from .master_proof import ONLY_HALF, has_remainders
from .new_checkpoint import TensorWriter, Written, copy_others

SOURCE = "dp_reshardable"
_TARGET = "fully_reshardable"
_SHARDING = "param_state_sharding_type"
#: What the source only has: buckets, their sizes and param_groups
#: (core/optimizer/distrib_optimizer.py:1535 and :1865, 0.19.2).
_OF_SOURCE = re.compile(r"(?:chained_\d+\.)?optimizer\.distributed\.")


def write(stored: StoredCheckpoint, directory: Path) -> Written:
    """Write the files of the converted iteration.

    Args:
        stored: The checkpoint, with state by bucket.
        directory: The new directory of the iteration.

    Raises:
        CheckpointError: The checkpoint is damaged, or it is not certain which parameter lies where.
    """
    _require_masters(stored)
    store = Store(stored.directory)
    values = _common(store)
    buckets = buckets_of(store)
    reader = Reader(store, buckets)
    weights = weights_of(store, Style.of_arguments(stored.args))
    places = find(store, buckets, reader, weights)
    _require_whole(store, places, weights)
    pieces: dict[str, list[tuple[tuple[int, ...] | None, Any]]] = defaultdict(list)
    for index, info in store.index.storage_data.items():
        pieces[index.fqn].append((index.offset, info))
    files = {info.relative_path for infos in pieces.values() for _, info in infos}
    writer = TensorWriter(directory, max((stored.directory / f).stat().st_size for f in files))
    copied = 0
    for key, entry in store.index.state_dict_metadata.items():
        if _OF_SOURCE.match(key):
            continue
        change = functools.partial(with_values, values=values, where=f"{stored.directory}: {key}")
        writer.copy(store, key, entry, pieces[key], change if key == COMMON_KEY else bytes)
        copied += 1
    made, differing = _write_states(store, reader, writer, places)
    writer.finish()
    copy_others(stored.directory, directory, {*files, INDEX, COMMON})
    if (path := stored.directory / COMMON).is_file():
        (directory / COMMON).write_bytes(with_values(path.read_bytes(), values, str(path)))
    return Written(made, copied, writer.size, differing)


def _require_masters(stored: StoredCheckpoint) -> None:
    if has_remainders(stored):
        raise CheckpointError(
            f"{stored.directory}: expected master weights, which tell what a bucket holds, found "
            f"int16 numbers: {ONLY_HALF}. Load the checkpoint with the configuration that wrote it "
            "and megatron_ext.SelectiveAdam, which saves whole master weights with "
            "--dist-ckpt-optim-fully-reshardable"
        )


def _common(store: Store) -> dict[str, Any]:
    """Return what changes in the common state.

    It then holds the param_groups that each model-parallel rank has saved by itself.
    """
    common = store.common()
    section = common["optimizer"]
    chained = all(isinstance(key, int) for key in section)
    optimizers = {n: dict(s) for n, s in (section if chained else {0: section}).items()}
    first: dict[tuple[int, str], str] = {}
    for key in filter(None, map(GroupsKey.parse, store.index.state_dict_metadata)):
        value = store.object(key.key)
        kept = first.setdefault((key.number, key.name), key.key)
        if kept != key.key and store.object(kept) != value:
            raise CheckpointError(
                f"{store.directory}: {key.key}: expected what {kept} holds, found other "
                "param_groups. State by parameter has them once. Make the arguments of all ranks "
                "equal and save again"
            )
        optimizers.setdefault(key.number, {})[key.name] = plain(value, key.key)
    for optimizer in optimizers.values():
        optimizer[_SHARDING] = _TARGET
    content = {
        **plain(common.get("content_metadata") or {}, "content_metadata"),
        "distrib_optim_sharding_type": _TARGET,
        # The keys of a chain have no number then (core/optimizer/optimizer.py:1551, 0.19.2).
        "chained_optim_avoid_prefix": True,
    }
    return {"optimizer": optimizers if chained else optimizers[0], "content_metadata": content}


def _require_whole(store: Store, places: Places, weights: Weights) -> None:
    """Check that a tensor of the weights has state for all its layers and experts, or for none.

    Megatron neither saves nor loads other state by parameter
    (validate_sharding_integrity, core/dist_checkpointing/validation.py:406, 0.19.2).
    """
    found = {id(weight) for _, parts in places for _, weight in parts}
    keys = {weight.key for _, parts in places for _, weight in parts}
    missing = [w.name for w in weights.all if w.key in keys and id(w) not in found]
    if missing:
        raise CheckpointError(
            f"{store.directory}: expected state of all layers and experts of a tensor or of none, "
            f"found none of {first_of(list(dict.fromkeys(missing)))}, which were frozen. Megatron "
            "cannot load that by parameter: go on with the tensor, pipeline and expert parallel "
            "sizes of the run that wrote it"
        )


def _write_states(
    store: Store, reader: Reader, writer: TensorWriter, places: Places
) -> tuple[int, tuple[str, ...]]:
    """Write every piece of the optimizer's state once; return their tensors, and what differs."""
    copies = Counter(id(weight) for _, parts in places for _, weight in parts)
    written: dict[tuple[int, str], bytes] = {}
    chunks: dict[str, list[tuple[Any, Any]]] = defaultdict(list)
    about: dict[str, tuple[Any, Any]] = {}
    differing: dict[str, None] = {}
    entries = store.index.state_dict_metadata
    for bucket, parts in places:
        for state, key in bucket.states.items():
            values = reader.read(key)
            for slot, weight in parts:
                mine = values[slot.begin : slot.end]
                # The first rank's copy is kept, as in a save by parameter: it is the main replica.
                digest = fingerprint(mine)[1] if copies[id(weight)] > 1 else b""
                if (id(weight), state) in written:
                    if written[id(weight), state] != digest:
                        differing[weight.name] = None
                    continue
                written[id(weight), state] = digest
                new = f"optimizer.state.{state}.{weight.key}"
                buffer = io.BytesIO()
                torch.save(mine.clone().view(weight.shape), buffer)
                writer.add(new, weight.offset, buffer.getbuffer())
                chunks[new].append((weight.offset, weight.shape))
                about.setdefault(new, (entries[key].properties, entries[weight.key].size))
    for new, (properties, shape) in about.items():
        writer.describe(new, properties, shape, chunks[new])
    return len(about), tuple(differing)
