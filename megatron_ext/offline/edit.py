"""Copy a checkpoint with other values in its param_groups and scheduler."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..base.files import new_directory
from ..checkpoint import torch_file
from ..checkpoint.store import (
    COMMON,
    COMMON_KEY,
    INDEX,
    LEGACY_FILE,
    TRACKER,
    GroupsKey,
    Store,
    read_file,
)
from ..checkpoint.stored import StoredCheckpoint, open_checkpoint
from ..errors import CheckpointError
from ..policy.match import Scalar
from . import allowed, copying
from .edit_settings import EditedValue, Value, plan_edit, value_at
from .fitting_flags import FittingFlags, fitting_flags
from .new_checkpoint import require_new

ProgressBar = Callable[[int, str], AbstractContextManager[copying.Progress | None]]


def _no_bar(total: int, what: str) -> AbstractContextManager[None]:
    return nullcontext()


@dataclass(frozen=True)
class Edited:
    """The result of an edit.

    Args:
        directory: The iteration's directory that was written.
        iteration: Its number, 0 for a release.
        changes: Every value that was set, even if it was the same before.
        written: New files, by path in `directory`.
        copied: Number of other files, copied.
        cloned: Number of other files whose blocks the file system shares until one side is written.
        linked: Number of other files that are hard links to the source's.
        flags: The flags with which stock Megatron resumes from the copy.
    """

    directory: Path
    iteration: int
    changes: tuple[EditedValue, ...]
    written: tuple[str, ...]
    copied: int
    cloned: int
    linked: int
    flags: FittingFlags


def edit(
    source: str | Path,
    target: str | Path,
    settings: Mapping[str, Value],
    group: Mapping[str, Scalar] | None = None,
    iteration: int | None = None,
    allow_pickle: bool = False,
    *,
    hard_links: bool = False,
    progress_bar: ProgressBar = _no_bar,
) -> Edited:
    """Write a copy of a checkpoint with other hyperparameters.

    The source is only read. The target appears when it is complete and on the disk.

    Args:
        source: The directory given to ``--save``, or the directory of one iteration.
        target: A new or empty directory for ``--load``; it gets this one iteration.
        settings: Key of the param_groups, of the scheduler's state or of both -> new value.
            ``weight_decay`` is that of a group with ``wd_mult`` 1; it sets ``start_wd`` and
            ``end_wd`` too, from which Megatron's scheduler computes it.
        group: Attributes of the param_groups to edit; by default all are edited. The scheduler
            changes too, unless another group keeps its value.
        iteration: The iteration to copy; by default the one in the tracker file.
        allow_pickle: Whether code in the checkpoint's pickles may run.
        hard_links: Whether the files that do not change are hard links to the source's. Megatron
            writes into files that exist: a save of the same iteration into either directory then
            destroys the other's.
        progress_bar: Makes a progress bar for a number of bytes and a label.

    Raises:
        PolicyError: A setting does not fit the saved values, or Megatron's scheduler would
            overwrite it. The error names it.
        CheckpointError: The source is damaged, needs classes that may not be loaded or has links
            to other files, or the target exists.
        OSError: A file cannot be written.
    """
    target = Path(target)
    stored = open_checkpoint(source, iteration)
    require_new(target, stored)
    stored.require_files()
    places = _read_places(stored)
    changes = plan_edit(places, settings, group)
    files = copying.files_of(stored.directory, stored.root)
    name = "release" if stored.release else f"iter_{stored.iteration:07d}"
    with new_directory(target) as partial:
        made = partial / name
        made.mkdir()
        written, values = _write(stored, made, changes, allow_pickle)
        others = [file for file in files if str(file) not in written]
        size = sum((stored.directory / file).stat().st_size for file in others)
        ways = Counter[copying.Way]()
        with progress_bar(size, "copying") as progress:
            for file in others:
                (made / file).parent.mkdir(exist_ok=True, parents=True)
                way = copying.copy(
                    stored.directory / file, made / file, progress, hard_link=hard_links
                )
                ways[way] += 1
        _check(stored, made, places, values)
        (partial / TRACKER).write_text("release" if stored.release else str(stored.iteration))
    counts = {way: ways[way] for way in ("copied", "cloned", "linked")}
    flags = fitting_flags(open_checkpoint(target))
    return Edited(target / name, stored.iteration, changes, tuple(written), **counts, flags=flags)


def _set(state: Any, change: EditedValue) -> Any:
    """Set one value and return it as it will be read: a tensor rounds it."""
    owner = value_at(state, change.path)
    old = owner[change.key]
    if isinstance(old, torch.Tensor):
        owner[change.key] = torch.full_like(old, change.new)
        return owner[change.key].item()
    owner[change.key] = change.new
    return change.new


def _read_places(stored: StoredCheckpoint) -> dict[str, Any]:
    """Read every object that may hold param_groups or the scheduler's state, running nothing."""
    if stored.format == "torch":
        files = sorted(stored.directory.glob(f"mp_rank_*/{LEGACY_FILE}"))
        found = {
            str(f.relative_to(stored.directory)): read_file(f, torch_file.load_torch) for f in files
        }
    else:
        store = Store(stored.directory)
        common = COMMON_KEY if store.common_in_store else COMMON
        found = {common: store.common()}
        found |= {k.key: store.object(k.key) for k in store.group_keys()}
    for where, value in found.items():
        if not isinstance(value, Mapping):
            raise CheckpointError(
                f"{stored.directory}: {where}: expected a dict, found a {type(value).__name__}. "
                "Restore the checkpoint or choose another with --iteration"
            )
    return found


def _write(
    stored: StoredCheckpoint, made: Path, changes: Iterable[EditedValue], allow_pickle: bool
) -> tuple[list[str], dict[str, list[EditedValue]]]:
    """Write the changed objects; return the files and, by place, the changes as written."""
    by_place: dict[str, list[EditedValue]] = defaultdict(list)
    for change in changes:
        by_place[change.where].append(change)
    done: dict[str, list[EditedValue]] = {}
    files, objects = [], {}
    for where, mine in by_place.items():
        in_store = where == COMMON_KEY or GroupsKey.parse(where) is not None
        value = _load(stored.directory, where, in_store, allow_pickle)
        done[where] = [dataclasses.replace(c, new=_set(value, c)) for c in mine]
        if in_store:
            objects[where] = value
        else:
            (made / where).parent.mkdir(exist_ok=True)
            with copying.opened(made / where) as file:
                torch.save(value, file)
            files.append(where)
    if objects:
        files += _write_objects(stored.directory, made, objects, allow_pickle)
    return files, done


def _load(directory: Path, where: str, in_store: bool, allow_pickle: bool) -> Any:
    def load(file: Any) -> Any:
        return allowed.load_torch(file, f"{directory}: {where}", allow_pickle)

    return Store(directory).object(where, load) if in_store else read_file(directory / where, load)


def _write_objects(
    source: Path, made: Path, objects: Mapping[str, Any], allow_pickle: bool
) -> list[str]:
    """Write objects into a new file, and an index that points to them."""
    path = source / INDEX
    index = read_file(path, lambda file: allowed.load_index(file, str(path), allow_pickle))
    name = next(n for i in range(10**6) if not (source / (n := f"__edited_{i}.distcp")).exists())
    places = {place.fqn: place for place in index.storage_data if place.fqn in objects}
    with copying.opened(made / name) as file:
        for key, value in objects.items():
            begin = file.tell()
            torch.save([value], file)
            index.storage_data[places[key]] = dataclasses.replace(
                index.storage_data[places[key]],
                relative_path=name,
                offset=begin,
                length=file.tell() - begin,
            )
    with copying.opened(made / INDEX) as file:
        pickle.dump(index, file)
    return [name, INDEX]


def _check(
    stored: StoredCheckpoint,
    made: Path,
    places: Mapping[str, Any],
    values: Mapping[str, Iterable[EditedValue]],
) -> None:
    """Check that the copy reads as the source with the changes, before it is renamed."""
    expected = copy.deepcopy(dict(places))
    for where, changes in values.items():
        for change in changes:
            _set(expected[where], change)
    again = open_checkpoint(made)
    found = _read_places(again)
    # The texts are compared as well: NaN equals nothing, and numpy moved the module of its arrays.
    same = found == expected or _written_out(found) == _written_out(expected)
    if not same or again.tensors != stored.tensors:
        raise CheckpointError(
            f"the copy of {stored.directory} does not read as the original with the changes: a "
            "fault of megatron_ext. Nothing was left behind; please report it"
        )


def _written_out(places: Mapping[str, Any]) -> str:
    return repr(places).replace("numpy.core.", "numpy._core.")
