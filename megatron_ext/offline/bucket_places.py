"""Find out which parameter lies where in the buckets of a checkpoint, or refuse by name."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from ..base.text import first_of
from ..checkpoint.store import Store
from ..errors import CheckpointError
from .bucket_edges import ALIGNMENT
from .bucket_order import Buffer, decide
from .bucket_proof import cut
from .bucket_reading import MASTER, SAVE_ONCE_MORE, Bucket, Reader
from .bucket_weights import Slot, Weight, Weights, fingerprint

#: The buckets in order, each with its parts and the weight that each part is.
Places = list[tuple[Bucket, list[tuple[Slot, Weight]]]]


def find(store: Store, buckets: Sequence[Bucket], reader: Reader, weights: Weights) -> Places:
    """Find the weights in the buckets.

    Args:
        store: The checkpoint's store.
        buckets: Its buckets.
        reader: Reads them.
        weights: The weights of the model.

    Raises:
        CheckpointError: Master weights are no weights of the model, or it is not certain which.
    """
    cuts = []
    for bucket in buckets:
        key = bucket.states[MASTER]
        cuts.append(cut(reader.read(key), bucket.dtype, weights, reader.edges(key)))
    in_all = {id(w) for c in cuts for slot in c.slots for w in slot.candidates}
    for bucket, done in zip(buckets, cuts, strict=True):
        if done.foreign:
            raise _foreign(store, bucket, done.foreign[0], weights, in_all)
        if done.unclear:
            raise _unclear(store, bucket, done.unclear[0])
    buffers: dict[tuple[int, int, int], Buffer] = {}
    for bucket, done in zip(buckets, cuts, strict=True):
        buffer = buffers.setdefault(bucket.place[:3], Buffer(bucket.place[:2], []))
        buffer.candidates += [list(slot.candidates) for slot in done.slots]
    decide(buffers.values())
    left = {place: iter(buffer.candidates) for place, buffer in buffers.items()}
    open_ = [
        (bucket, [(slot, next(left[bucket.place[:3]])) for slot in done.slots])
        for bucket, done in zip(buckets, cuts, strict=True)
    ]
    _settle(store, reader, open_)
    _require_once(store, open_)
    return [(bucket, [(slot, c[0]) for slot, c in parts]) for bucket, parts in open_]


_Open = list[tuple[Bucket, list[tuple[Slot, list[Weight]]]]]


def _settle(store: Store, reader: Reader, places: _Open) -> None:
    """Choose among candidates where every choice gives the same state."""
    alike: dict[tuple[tuple[int, int], frozenset[int]], list[tuple[Bucket, Slot, list[Weight]]]]
    alike = defaultdict(list)
    for bucket, parts in places:
        for slot, candidates in parts:
            if len(candidates) != 1:
                of = frozenset(map(id, candidates))
                alike[bucket.place[:2], of].append((bucket, slot, candidates))
    for parts_alike in alike.values():
        weights = tuple(parts_alike[0][2])
        states = {_state(reader, bucket, slot) for bucket, slot, _ in parts_alike}
        if len(states) > 1 or len(weights) != len(parts_alike):
            raise _unclear(store, parts_alike[0][0], weights)
        for weight, (_, _, candidates) in zip(weights, parts_alike, strict=True):
            candidates[:] = [weight]


def _state(reader: Reader, bucket: Bucket, slot: Slot) -> tuple[bytes, ...]:
    return tuple(
        fingerprint(reader.read(bucket.states[state])[slot.begin : slot.end])[1]
        for state in sorted(bucket.states)
    )


def _require_once(store: Store, places: _Open) -> None:
    seen: set[tuple[tuple[int, int], int]] = set()
    for bucket, parts in places:
        for _, (weight,) in parts:
            if (mine := (bucket.place[:2], id(weight))) in seen:
                raise _unclear(store, bucket, (weight,))
            seen.add(mine)


def _foreign(
    store: Store, bucket: Bucket, part: tuple[int, int], weights: Weights, found: set[int]
) -> CheckpointError:
    begin, end = part
    fitting = [w for w in weights.all if w.dtype == bucket.dtype and w.elements <= end - begin]
    exact = [w for w in fitting if -(-w.elements // ALIGNMENT) == -(-(end - begin) // ALIGNMENT)]
    missing = [[w for w in some if id(w) not in found] for some in (exact, fitting)]
    named = list(dict.fromkeys(w.name for w in next(filter(None, (*missing, exact)), [])))
    return CheckpointError(
        f"{store.directory}: the master weights of {first_of(named) or 'a parameter'}: expected "
        f"that they are the model's weights, rounded to {bucket.dtype}, but elements {begin} to "
        f"{end} of {bucket.states[MASTER]} are no weights that the checkpoint stores. If the "
        "weights were edited after the save, resume with --selective-master-weights model and "
        "save with --dist-ckpt-optim-fully-reshardable; if the run had --main-params-dtype fp16, "
        "its master weights are rounded on their own and tell nothing: load the checkpoint with "
        "the configuration that wrote it and save it once more with "
        "--dist-ckpt-optim-fully-reshardable; otherwise a file is damaged: restore it or convert "
        "another iteration"
    )


def _unclear(store: Store, bucket: Bucket, weights: Sequence[Weight]) -> CheckpointError:
    named = list(dict.fromkeys(w.name for w in weights))
    return CheckpointError(
        f"{store.directory}: {bucket.states[MASTER]}: expected that the model's weights tell "
        f"which parameter lies where, found equal weights: {first_of(named)}. Neither their "
        f"order nor their optimizer state tells them apart. {SAVE_ONCE_MORE}"
    )
