"""Convert optimizer state to ``fully_reshardable``: by parameter, and each parameter's own.

`.convert_buckets` does that for state by bucket, ``dp_reshardable``, and `.convert_shifted` for
``fully_reshardable`` state that was stored shifted. Here it is done for
``fully_sharded_model_space``. Up to megatron-core 0.15 a distributed optimizer's state was
flattened so that each data-parallel rank could write a range. A tensor of global shape (X, Y), cut
by tensor parallelism into shards of (x, y), is stored as (X/x, Y/y, x*y). Its own shape is in the
index (core/dist_checkpointing/strategies/resharding.py, 0.15.3). The conversion reassembles the
ranges under the keys of the new form. Everything else is copied byte by byte, and no pickle of the
checkpoint is run.
"""

from __future__ import annotations

import io
import itertools
import math
import pickle
import pickletools
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..base.files import new_directory
from ..checkpoint import torch_file
from ..checkpoint.state import FLATTENED
from ..checkpoint.store import COMMON, INDEX, TRACKER, Store
from ..checkpoint.stored import StoredCheckpoint, open_checkpoint
from ..errors import CheckpointError
from . import convert_buckets, convert_shifted
from .new_checkpoint import TensorWriter, Written, copy_others, require_new, reshardable_key

_TARGET = "fully_reshardable"
#: Key of a flattened tensor's own shape in the index (strategies/torch.py:291, 0.15.3).
_SHAPE = "nd_reformulated_orig_global_shape"


@dataclass(frozen=True, kw_only=True)
class Converted(Written):
    """The result of a conversion.

    Args:
        directory: The iteration's directory that was written.
        iteration: Its number.
    """

    directory: Path
    iteration: int


def convert(
    source: str | Path, target: str | Path, iteration: int | None = None, to: str | None = None
) -> Converted:
    """Write a ``fully_reshardable`` copy of a checkpoint.

    Only one parameter's shard, or one bucket, is in memory at a time. The source is only read. The
    target appears when it is complete.

    Args:
        source: The directory given to ``--save``, or the directory of one iteration.
        target: A new directory of the same kind; it gets this one iteration.
        iteration: The iteration to convert; by default the one in the tracker file.
        to: ``fully_reshardable`` also converts state that is stored by bucket, which Megatron
            reads, and puts back state that was stored shifted; by default only
            ``fully_sharded_model_space`` is converted.

    Raises:
        CheckpointError: The source is not such a checkpoint, is damaged, the target exists, or it
            is not certain where the parameters lie in the buckets.
    """
    target = Path(target)
    stored = open_checkpoint(source, iteration)
    write = _write
    if to == _TARGET and stored.sharding_type == convert_buckets.SOURCE:
        write = convert_buckets.write
    elif to == _TARGET == stored.sharding_type and convert_shifted.needed(stored):
        write = convert_shifted.write
    else:
        _require_convertible(stored, to)
    require_new(target, stored)
    bare = stored.directory == stored.root
    with new_directory(target) as partial:
        directory = partial if bare else partial / stored.directory.name
        directory.mkdir(exist_ok=True)
        done = write(stored, directory)
        if not bare:
            (partial / TRACKER).write_text("release" if stored.release else str(stored.iteration))
        _check(stored, open_checkpoint(partial))
    written = target if bare else target / stored.directory.name
    return Converted(directory=written, iteration=stored.iteration, **vars(done))


def _require_convertible(stored: StoredCheckpoint, to: str | None) -> None:
    if stored.sharding_type != FLATTENED:
        kind = stored.sharding_type or (
            "the format torch"
            if stored.store is None
            else "torch_dist without a distributed optimizer's state"
        )
        other_way = ""
        if kind == convert_buckets.SOURCE:
            other_way = f", or convert it with --to {_TARGET}"
        elif kind == _TARGET and to is None:
            other_way = (
                ". If `inspect --moments` finds master weights that are not the model's, "
                f"--to {_TARGET} puts shifted state back"
            )
        raise CheckpointError(
            f"{stored.directory}: expected optimizer state of the sharding {FLATTENED}, found "
            f"{kind}. There is nothing to convert: load it as it is{other_way}"
        )
    if not (stored.directory / COMMON).is_file():
        raise CheckpointError(
            f"{stored.directory}: expected {COMMON}, found none. megatron-core up to 0.15 writes "
            f"it with {FLATTENED}: is the checkpoint complete?"
        )


def _write(stored: StoredCheckpoint, directory: Path) -> Written:
    store = Store(stored.directory)
    shapes = _shapes(store)
    pieces: dict[str, list[tuple[tuple[int, ...] | None, Any]]] = defaultdict(list)
    for place, info in store.index.storage_data.items():
        pieces[place.fqn].append((place.offset, info))
    files = {info.relative_path for infos in pieces.values() for _, info in infos}
    writer = TensorWriter(directory, max((stored.directory / f).stat().st_size for f in files))
    for key, entry in store.index.state_dict_metadata.items():
        if key in shapes:
            _reshape(store, writer, key, entry, shapes[key], pieces[key])
        else:
            writer.copy(store, key, entry, pieces[key])
    writer.finish()
    copy_others(stored.directory, directory, {*files, INDEX, COMMON})
    _rewrite_common(stored.directory / COMMON, directory / COMMON)
    copied = len(store.index.state_dict_metadata) - len(shapes)
    return Written(len(shapes), copied, writer.size)


def _shapes(store: Store) -> dict[str, tuple[int, ...]]:
    """Return key -> global shape of the flattened tensors."""
    noted = getattr(store.index, "mcore_data", None) or {}
    shapes = {key: tuple(data[_SHAPE]) for key, data in noted.items() if data.get(_SHAPE)}
    if not shapes:
        raise CheckpointError(
            f"the index of the checkpoint notes no {_SHAPE}, as megatron-core 0.14 and 0.15 do. "
            "Load it with megatron-core 0.15 and save it with "
            "--dist-ckpt-optim-fully-reshardable"
        )
    return shapes


def _reshape(
    store: Store,
    writer: TensorWriter,
    key: str,
    entry: Any,
    shape: tuple[int, ...],
    pieces: Iterable[tuple[tuple[int, ...] | None, Any]],
) -> None:
    """Reassemble each shard of a tensor from its ranges and write it in its own shape."""
    *cuts, elements = entry.size
    local = tuple(whole // parts for whole, parts in zip(shape, cuts, strict=True))
    if math.prod(local) != elements or any(w % p for w, p in zip(shape, cuts, strict=True)):
        raise CheckpointError(f"{key}: {tuple(entry.size)} is no flattened form of {shape}")
    ranges: dict[tuple[int, ...], list[tuple[int, Any]]] = defaultdict(list)
    for offset, info in pieces:
        assert offset is not None
        ranges[tuple(offset[:-1])].append((offset[-1], info))
    chunks = []
    for cell in itertools.product(*(range(parts) for parts in cuts)):
        flat, end = [], 0
        for begin, info in sorted(ranges.get(cell, ()), key=lambda r: r[0]):
            values = _tensor(store.read(info, key)).reshape(-1)
            if begin != end:
                break
            flat.append(values)
            end += len(values)
        if end != elements:
            raise CheckpointError(
                f"{key}: the shard {cell} ends at element {end} of {elements}: the checkpoint is "
                "incomplete"
            )
        at = tuple(index * size for index, size in zip(cell, local, strict=True))
        buffer = io.BytesIO()
        torch.save(torch.cat(flat).view(local), buffer)
        writer.add(reshardable_key(key), at, buffer.getbuffer())
        chunks.append((at, local))
    writer.describe(reshardable_key(key), entry.properties, shape, chunks)


def _tensor(data: bytes) -> torch.Tensor:
    found: torch.Tensor = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return found


def _rewrite_common(source: Path, target: Path) -> None:
    """Copy ``common.pt`` with the new sharding's name; everything else stays, also enums."""
    with source.open("rb") as file:
        metadata = torch_file.load_torch(file).get("content_metadata") or {}
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for entry in old.infolist():
            data = old.read(entry)
            if entry.filename.endswith("/data.pkl"):
                data = _rewrite_pickle(data, metadata)
            new.writestr(entry.filename, data, zipfile.ZIP_STORED)


def _rewrite_pickle(data: bytes, metadata: Mapping[str, Any]) -> bytes:
    """Rename the sharding in every optimizer, and set it in ``content_metadata``.

    Megatron reads the latter (training/checkpointing.py:2198, 0.19.2). It is set by appending to
    the pickle of the dict: its value, then SETITEM.
    """
    old, new = (_unicode(name) for name in (FLATTENED, _TARGET))
    out, last = bytearray(), 0
    operations = list(pickletools.genops(data))
    if any(op.name == "FRAME" for op, _, _ in operations):
        raise CheckpointError(f"{COMMON}: expected a pickle of protocol 2 or 3, found frames")
    for op, argument, position in operations:
        assert position is not None
        if op.name == "BINUNICODE" and argument == FLATTENED:
            out += data[last:position] + new
            last = position + len(old)
    out += data[last:-1]
    value = {**metadata, "distrib_optim_sharding_type": _TARGET}
    out += _unicode("content_metadata") + pickle.dumps(value, 2)[2:-1]
    return bytes(out) + pickle.SETITEM + pickle.STOP


def _unicode(text: str) -> bytes:
    return pickle.BINUNICODE + len(text).to_bytes(4, "little") + text.encode()


def _check(stored: StoredCheckpoint, made: StoredCheckpoint) -> None:
    """Check that the copy reads as the original, before it is renamed."""
    same = ("iteration", "release", "args", "optimizers", "scheduler", "grad_scalers")
    others = [{k: v for k, v in c.other.items() if k != "content_metadata"} for c in (stored, made)]
    if (
        made.sharding_type != _TARGET
        or others[0] != others[1]
        or any(getattr(stored, name) != getattr(made, name) for name in same)
    ):
        raise CheckpointError(
            f"the copy of {stored.directory} does not read as the original: a fault of "
            "megatron_ext. Nothing was left behind; please report it"
        )
