"""Make a checkpoint file that cannot be read one error, which names the file, on every rank.

Stock reads a torch_dist checkpoint on each rank alone (``no_dist=True``, core/dist_checkpointing/
strategies/torch.py:989, 0.19.2), so that the other ranks do not hear of a damaged file, and ends a
rank that cannot read a legacy file with exit status 0 (training/checkpointing.py:1743).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from ..base import ranks
from ..checkpoint import checksums
from ..checkpoint.store import COMMON, COMMON_KEY, INDEX, read_file, unreadable
from ..errors import CheckpointError, MegatronExtError
from ..resume import store_reader
from ..resume.members import members_of
from ..resume.session import current


@contextlib.contextmanager
def files_of(call: Mapping[str, Any]) -> Iterator[None]:
    """Read the files of one ``dist_checkpointing.load``.

    Args:
        call: Its arguments.

    Raises:
        CheckpointError: A file cannot be read, on the rank that met it.
        AgreementError: Another rank met it.
    """
    # With a process group only some ranks load. Without the check of the access only this one may.
    everyone = call.get("process_group") is None and call.get("validate_access_integrity", True)
    with metadata_read_once(), store_reader.active(verify=verifies(), together=everyone):
        error = _state_error(Path(call["checkpoint_dir"]))
        if everyone:
            ranks.stop_together("reading the checkpoint", error)
        elif error is not None:
            raise error
        yield


def verifies() -> bool:
    """Whether the CRC32 of everything that is read is compared (``--selective-verify``)."""
    return any(member.resume.verify for member in members_of(current.member))


def together(load: Callable[[], Any], path: Path) -> Any:
    """Call `_load_base_checkpoint` on every rank; if one rank cannot read, every rank raises.

    Collective over the default group (40 bytes per rank).

    Args:
        load: Makes the call.
        path: This rank's file, or the directory of the checkpoint.

    Raises:
        CheckpointError: This rank cannot read.
        AgreementError: Another rank cannot.
    """
    result: Any = None
    error: MegatronExtError | None = None
    try:
        with store_reader.active():
            result = load()
    except SystemExit as e:
        if e.__context__ is None:  # --exit-on-missing-checkpoint ends every rank
            raise
        error = unreadable(path, e.__context__)
    except (Exception, CheckpointException) as e:
        found = cause(e)
        error = found if isinstance(found, MegatronExtError) else unreadable(path, e)
    ranks.stop_together("reading the checkpoint", error)
    return result


def cause(error: BaseException) -> BaseException:
    """Return our error inside of torch's CheckpointException, which is no Exception.

    megatron-core 0.16 lets torch gather the errors of all ranks. Later ones read on each rank
    alone, where torch counts the rank as 0.
    """
    if not isinstance(error, CheckpointException):
        return error
    ours = {r: e for r, (e, _) in error.failures.items() if isinstance(e, MegatronExtError)}
    rank = dist.get_rank() if dist.is_initialized() else 0
    return ours.get(rank, next(iter(ours.values()), error))


def _state_error(directory: Path) -> CheckpointError | None:
    """Read what every rank needs of a torch_dist checkpoint before anything is loaded."""
    filesystem = importlib.import_module("torch.distributed.checkpoint.filesystem")
    if not (directory / INDEX).is_file():
        return None  # remote, or the load itself raises an error
    try:
        places = filesystem.FileSystemReader(directory).read_metadata().storage_data
    except Exception as e:  # a damaged pickle fails in any way
        return unreadable(directory / INDEX, e)
    try:
        if (directory / COMMON).is_file():
            read_file(directory / COMMON, checksums.require_sums)
        for key, place in places.items():
            if key.fqn == COMMON_KEY:
                check = functools.partial(checksums.require_item_sums, place=place)
                read_file(directory / place.relative_path, check)
    except CheckpointError as e:
        return e
    return None


@contextlib.contextmanager
def metadata_read_once() -> Iterator[None]:
    """Make torch's reader unpickle each ``.metadata`` file once.

    Stock unpickles it twice per load on every rank (strategies/torch.py:976 and :1028, 0.19.2), and
    its size grows with the tensors and ranks of the whole job. Megatron's own
    CachedMetadataFileSystemReader shares the metadata in the same way.
    """
    reader = importlib.import_module("torch.distributed.checkpoint.filesystem").FileSystemReader
    original, known = reader.read_metadata, {}

    @functools.wraps(original)
    def read_metadata(self: Any, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return original(self, *args, **kwargs)
        path = str(self.path)
        if path not in known:
            known[path] = original(self)
        known[path].storage_meta.load_id = self.load_id
        return known[path]

    reader.read_metadata = read_metadata
    try:
        yield
    finally:
        reader.read_metadata = original
