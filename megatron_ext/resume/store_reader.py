"""Make torch's reader of distributed checkpoints faster, and its errors those of a file."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..base import ranks
from ..checkpoint import checksums
from ..checkpoint.store import COMMON_KEY
from ..errors import MegatronExtError
from .direct_read import by_file, named, read_in_place


@contextlib.contextmanager
def active(*, verify: bool = False, together: bool = False) -> Iterator[None]:
    """Make torch's reader of distributed checkpoints read plain tensors in one copy.

    An error names the file. The CRC32 of objects is always compared, which torch does not do
    (`megatron_ext.checkpoint.checksums`): they are small, and the param_groups are among them.

    Args:
        verify: Whether the CRC32 of tensors is compared too.
        together: Whether all ranks read at the same time, so that they agree on the result
            (collective over the default group, 40 bytes per rank and read).

    Raises:
        CheckpointError: From the read: a file cannot be read, or a CRC32 differs. With `together`
            every rank raises.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    original = FileSystemReader.read_data

    @functools.wraps(original)
    def read_data(self: Any, plan: Any, planner: Any) -> Any:
        error: MegatronExtError | None = None
        try:
            left = read_in_place(self, plan.items, planner, verify=verify)
            for path, items in by_file(self, left).items():
                with named(Path(self.path) / path):
                    _require_sums(self, path, items, tensors=verify)
                    original(self, replace(plan, items=items), planner)
        except MegatronExtError as e:
            error = e
        # Every rank has read the common state before (`megatron_ext.hooks.reading`).
        common = {item.storage_index.fqn for item in plan.items} == {COMMON_KEY}
        if together and not common:
            ranks.stop_together("reading the checkpoint", error)
        elif error is not None:
            raise error
        return original(self, replace(plan, items=[]), planner)

    FileSystemReader.read_data = read_data  # type: ignore[method-assign]
    try:
        yield
    finally:
        FileSystemReader.read_data = original  # type: ignore[method-assign]


def _require_sums(reader: Any, path: str, items: Sequence[Any], *, tensors: bool) -> None:
    """Compare the CRC32 of the items of a file that torch is to read.

    Raises:
        Exception: A damaged item may raise any exception.
    """
    from torch.distributed.checkpoint.planner import LoadItemType

    stored = {
        item.storage_index: reader.storage_data[item.storage_index]
        for item in items
        if tensors or item.type == LoadItemType.BYTE_IO
    }
    plain = [s for s in stored.values() if not getattr(s, "transform_descriptors", None)]
    with reader.fs.create_stream(reader.fs.concat_path(reader.path, path), "rb") as stream:
        for place in plain:
            checksums.require_item_sums(stream, place)
