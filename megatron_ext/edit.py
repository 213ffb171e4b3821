"""A copy of a checkpoint with other hyperparameters, for a resume with stock Megatron.

Stock Megatron takes a param_group's values from the checkpoint; from megatron-core 0.19 on it even
finds the group by some of them (`param_group_identifier_keys`, core/optimizer/optimizer.py). Here
they are changed in every place that a checkpoint has them in: the common state, one object for each
model-parallel group and optimizer of the chain, or the file of each model-parallel rank. Only these
are written; all other files of the copy are hard links to the source's.
"""

from __future__ import annotations

import copy
import dataclasses
import errno
import math
import os
import pickle
import re
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import allowed, inert
from .checkpoint import NOT_HYPERPARAMETERS, canonical, optimizer_section, saved_key
from .errors import CheckpointError, PolicyError
from .new_directory import new_directory, require_new
from .policy import Scalar, attributes, has_attributes, scalar
from .stored import (
    COMMON,
    COMMON_KEY,
    INDEX,
    LEGACY_FILE,
    TRACKER,
    GroupsKey,
    Store,
    StoredCheckpoint,
    has_groups,
    open_checkpoint,
    read_file,
)

#: The scheduler's state in a checkpoint; the second is what Megatron called it earlier.
_SCHEDULERS = ("opt_param_scheduler", "lr_scheduler")
#: What the scheduler computes for every group at load, so that groups differ in it by themselves.
_COMPUTED = ("lr", "weight_decay")
#: Where a hard link cannot be made, or not to this file.
_NO_LINK = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS)

Step = str | int
Value = Scalar | tuple[Scalar, ...]
#: A param_group or the state of a scheduler: where, which keys lead to it, and it.
_Found = tuple[str, tuple[Step, ...], Mapping[str, Any]]


@dataclass(frozen=True)
class EditedValue:
    """One value in one place of a checkpoint.

    Args:
        where: The place: a key of the store, or a file's path in the iteration's directory.
        path: Keys that lead to the param_group, or to the scheduler's state, in what is there.
        key: Of the value.
        old: The saved value; a tensor without dimensions as a number.
        new: What it becomes, of the same type.
    """

    where: str
    path: tuple[Step, ...]
    key: str
    old: Any
    new: Any

    @property
    def in_scheduler(self) -> bool:
        """Whether it is the scheduler's, not a param_group's."""
        return self.path[0] in _SCHEDULERS


@dataclass(frozen=True)
class Edited:
    """What an edit did.

    Args:
        directory: The iteration's directory that was written.
        iteration: Its number, 0 for a release.
        changes: Every value that was set, also where it was the same before.
        written: Files that are new, by path in `directory`.
        linked: How many files are hard links to the source's.
        copied: How many were copied because a link could not be made.
    """

    directory: Path
    iteration: int
    changes: tuple[EditedValue, ...]
    written: tuple[str, ...]
    linked: int
    copied: int


def edit(
    source: str | Path,
    target: str | Path,
    settings: Mapping[str, Value],
    group: Mapping[str, Scalar] | None = None,
    iteration: int | None = None,
    allow_pickle: bool = False,
) -> Edited:
    """Write a copy of a checkpoint with other hyperparameters.

    The source is only read. The target appears when it is complete and on the disk.

    Args:
        source: What was given to ``--save``, or one iteration's own directory.
        target: A new or empty directory, for ``--load``, with this one iteration.
        settings: Key of the param_groups, of the scheduler's state or of both, and its value.
            ``weight_decay`` is that of a group with ``wd_mult`` 1.
        group: Attributes of the param_groups that are meant; all by default. The scheduler follows
            where no other group has its value.
        iteration: Which one; the tracker file's by default.
        allow_pickle: Whether code in the checkpoint's pickles may run.

    Raises:
        PolicyError: The settings do not fit what is saved; says which.
        CheckpointError: The source is damaged or holds what may not be loaded, or the target
            exists.
        OSError: A file cannot be written.
    """
    target = Path(target)
    stored = open_checkpoint(source, iteration)
    require_new(target, stored)
    stored.require_files()
    places = _read_places(stored)
    changes = plan(places, settings, group)
    name = "release" if stored.release else f"iter_{stored.iteration:07d}"
    with new_directory(target) as partial:
        made = partial / name
        made.mkdir()
        written, values = _write(stored, made, changes, allow_pickle)
        linked, copied = _link_others(stored.directory, made, set(written))
        _check(stored, made, places, values)
        (partial / TRACKER).write_text("release" if stored.release else str(stored.iteration))
    return Edited(target / name, stored.iteration, changes, tuple(written), linked, copied)


def parse_settings(words: Iterable[str], flag: str = "--set") -> dict[str, Value]:
    """Read ``KEY=VALUE``; a value with commas is several.

    Args:
        words: As they stand on a command line.
        flag: What the error calls them.

    Raises:
        PolicyError: One cannot be read, or a key is there twice.
    """
    out: dict[str, Value] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not re.fullmatch(r"\w+", key) or not text:
            raise PolicyError(f"{flag}: expected KEY=VALUE, found {word!r}")
        if key in out:
            raise PolicyError(f"{flag}: {key!r} is given twice; expected one value")
        inside = text.strip("()[]")
        several = "," in inside
        out[key] = tuple(scalar(t.strip()) for t in inside.split(",")) if several else scalar(text)
    return out


def plan(
    places: Mapping[str, Any],
    settings: Mapping[str, Value],
    group: Mapping[str, Scalar] | None = None,
) -> tuple[EditedValue, ...]:
    """Decide what is changed.

    Args:
        places: Where -> what is there: a training state, or one optimizer's state dict.
        settings: See `edit`.
        group: See `edit`.

    Returns:
        The changes, of groups first.

    Raises:
        PolicyError: See `edit`.
    """
    wanted = attributes(group or {}, "--group")
    if not settings:
        raise PolicyError("--set: expected at least one KEY=VALUE, found none")
    groups = [(w, p, _at(places[w], p)) for w in places for p in _group_paths(places[w])]
    chosen = [found for found in groups if has_attributes(canonical(found[2]), wanted)]
    if wanted and not chosen:
        have = sorted({_described(g, [k for k, _ in wanted]) for _, _, g in groups})
        raise PolicyError(
            f"--group {_text(wanted)}: fits no param_group; the checkpoint's have "
            f"{' | '.join(have) or 'no optimizer state'}"
        )
    schedulers: list[_Found] = [
        (w, (k,), state[k])
        for w, state in places.items()
        for k in _SCHEDULERS
        if isinstance(state.get(k), Mapping)
    ]
    changes = []
    for key, value in settings.items():
        found = _group_changes(key, value, chosen, bool(wanted))
        others = [g for g in groups if g not in chosen]
        found += _scheduler_changes(key, value, schedulers, found, others)
        if not found:
            raise _unknown(key, chosen, schedulers, bool(wanted))
        changes += found
    _check_range(places, changes)
    return tuple(sorted(changes, key=lambda c: c.in_scheduler))


def _group_changes(key: str, value: Value, groups: list[_Found], named: bool) -> list[EditedValue]:
    if key in NOT_HYPERPARAMETERS:
        raise PolicyError(
            f"--set {key}: it is state of the optimizer, not a hyperparameter: expected a key such "
            "as max_lr, min_lr, betas, eps or weight_decay"
        )
    out = []
    for where, path, group in groups:
        saved = saved_key(group, key)
        if saved in group:
            own = value
            if key == "weight_decay" and _is_number(value):
                own = value * canonical(group).get("wd_mult", 1.0)
            new = _typed(key, group[saved], own, f"a param_group of {where}")
            out.append(EditedValue(where, path, saved, group[saved], new))
    values = sorted({repr(c.old) for c in out})
    if len(values) > 1 and not named and key not in _COMPUTED:
        # Several values are no attribute to choose by.
        chosen_by = "is_expert_parallel=true" if "," in values[0] else f"{key}={values[0]}"
        raise PolicyError(
            f"--set {key}: the param_groups hold {' and '.join(values)}, and one value for all "
            "would make them the same. Choose those that are meant with --group, for example "
            f"--group {chosen_by}"
        )
    return out


def _scheduler_changes(
    key: str, value: Value, schedulers: list[_Found], mine: list[EditedValue], others: list[_Found]
) -> list[EditedValue]:
    """The scheduler's own value, which follows groups that had it; with `others`, all of them."""
    out = []
    for where, path, state in schedulers:
        if key not in state:
            continue
        chosen = any(c.old == state[key] for c in mine) or not (mine or others)
        if others and (not chosen or any(g.get(key) == state[key] for _, _, g in others)):
            continue
        new = _typed(key, state[key], value, f"{path[0]} of {where}")
        out.append(EditedValue(where, path, key, state[key], new))
    return out


def _typed(key: str, old: Any, new: Any, where: str) -> Any:
    """The new value in the saved one's type."""
    if isinstance(old, tuple | list):
        if isinstance(new, tuple | list) and len(new) == len(old):
            return type(old)(_typed(key, o, n, where) for o, n in zip(old, new, strict=True))
    elif isinstance(old, bool) or isinstance(new, bool):
        if isinstance(old, bool) and isinstance(new, bool):
            return new
    elif isinstance(old, float):
        if _is_number(new) and math.isfinite(new):
            return float(new)
    elif isinstance(old, int):
        if isinstance(new, int):
            return new
    elif old is None:
        if new is None or (_is_number(new) and math.isfinite(new)):
            return new
    elif isinstance(old, str) and isinstance(new, str):
        return new
    raise PolicyError(
        f"--set {key}: expected {_kind(old)} as in {where}, which has {old!r}; found {new!r}"
    )


def _kind(old: Any) -> str:
    kinds = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}
    if isinstance(old, tuple | list):
        return f"{len(old)} values with commas"
    if old is None:
        return "a number or none"
    return kinds.get(type(old), f"a {type(old).__name__} (which cannot be set)")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_range(places: Mapping[str, Any], changes: Iterable[EditedValue]) -> None:
    """That no group and no scheduler would decay from a lower to a higher rate, or so."""
    owners: dict[tuple[str, tuple[Step, ...]], dict[str, Any]] = defaultdict(dict)
    for change in changes:
        owners[change.where, change.path][change.key] = change.new
    for (where, path), new in owners.items():
        after = {**_at(places[where], path), **new}
        for low, high in (("min_lr", "max_lr"), ("start_wd", "end_wd")):
            both: list[Any] = [after.get(low), after.get(high)]
            if {low, high} & new.keys() and all(map(_is_number, both)) and both[0] > both[1]:
                raise PolicyError(
                    f"--set: expected {low} up to {high}, as Megatron asserts; found {low} "
                    f"{both[0]!r} and {high} {both[1]!r} in {where}. Set both"
                )


def _unknown(key: str, groups: list[_Found], schedulers: list[_Found], named: bool) -> PolicyError:
    known = {k for _, _, g in groups for k in canonical(g)} - set(NOT_HYPERPARAMETERS)
    in_scheduler = {k for _, _, s in schedulers for k in s}
    if named and key in in_scheduler:
        return PolicyError(
            f"--set {key}: the param_groups that --group chooses do not have it, only the "
            "scheduler, which is for all. Leave out --group"
        )
    return PolicyError(
        f"--set {key}: no such key is saved; expected one of the param_groups' "
        f"({', '.join(sorted(known)) or 'none'}) or the scheduler's "
        f"({', '.join(sorted(in_scheduler)) or 'none'})"
    )


def _described(group: Mapping[str, Any], keys: list[str]) -> str:
    values = canonical(group)
    return " ".join(f"{k}={values[k]}" if k in values else f"no {k}" for k in keys)


def _text(wanted: Sequence[tuple[str, Scalar]]) -> str:
    return " ".join(f"{key}={value}" for key, value in wanted)


def _group_paths(state: Mapping[str, Any]) -> Iterator[tuple[Step, ...]]:
    """Where the param_groups are in a training state or in an optimizer's state dict."""
    section = state.get("optimizer")
    candidates: list[tuple[tuple[Step, ...], Any]] = [((), state)]
    if isinstance(section, list):
        candidates = [(("optimizer", n), s) for n, s in enumerate(section)]
    elif isinstance(section, Mapping) and all(isinstance(n, int) for n in section):
        candidates = [(("optimizer", n), s) for n, s in section.items()]
    elif section is not None:
        candidates = [(("optimizer",), section)]
    for path, found in candidates:
        if isinstance(found, Mapping) and has_groups(found):
            name, inside = optimizer_section(found)
            nested = () if name is None else (name,)
            for number in range(len(inside["param_groups"])):
                yield (*path, *nested, "param_groups", number)


def _at(state: Any, path: Iterable[Step]) -> Any:
    for step in path:
        state = state[step]
    return state


def _set(state: Any, change: EditedValue) -> Any:
    """Set one value; returns it as it reads, which a tensor rounds."""
    owner = _at(state, change.path)
    old = owner[change.key]
    if isinstance(old, torch.Tensor):
        owner[change.key] = torch.full_like(old, change.new)
        return owner[change.key].item()
    owner[change.key] = change.new
    return change.new


def _read_places(stored: StoredCheckpoint) -> dict[str, Any]:
    """Every place that may have param_groups or the scheduler's state, nothing run."""
    if stored.format == "torch":
        files = sorted(stored.directory.glob(f"mp_rank_*/{LEGACY_FILE}"))
        found = {
            str(f.relative_to(stored.directory)): read_file(f, inert.load_torch) for f in files
        }
    else:
        store = Store(stored.directory)
        common = COMMON if (stored.directory / COMMON).is_file() else COMMON_KEY
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
    """Write what changes; the files, and by place the changes with the values as they read."""
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
            with (made / where).open("wb") as file:
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
    """Objects into a file of their own, and an index that leads there."""
    path = source / INDEX
    index = read_file(path, lambda file: allowed.load_index(file, str(path), allow_pickle))
    name = next(n for i in range(10**6) if not (source / (n := f"__edited_{i}.distcp")).exists())
    places = {place.fqn: place for place in index.storage_data if place.fqn in objects}
    with (made / name).open("wb") as file:
        for key, value in objects.items():
            begin = file.tell()
            torch.save([value], file)
            index.storage_data[places[key]] = dataclasses.replace(
                index.storage_data[places[key]],
                relative_path=name,
                offset=begin,
                length=file.tell() - begin,
            )
    with (made / INDEX).open("wb") as file:
        pickle.dump(index, file)
    return [name, INDEX]


def _link_others(source: Path, made: Path, written: set[str]) -> tuple[int, int]:
    """Hard links to all files but those that were written; how many, and how many copies."""
    linked = copied = 0
    for directory, _, names in os.walk(source, followlinks=True):
        inside = Path(directory).relative_to(source)
        (made / inside).mkdir(exist_ok=True)
        for name in names:
            if str(inside / name) in written:
                continue
            if _link(Path(directory) / name, made / inside / name):
                linked += 1
            else:
                copied += 1
    return linked, copied


def _link(path: Path, new: Path) -> bool:
    """Whether a link was made; else it is a copy."""
    try:
        os.link(path.resolve(), new)
    except OSError as e:
        if e.errno not in _NO_LINK:
            raise
        shutil.copy2(path, new)
        return False
    return True


def _check(
    stored: StoredCheckpoint,
    made: Path,
    places: Mapping[str, Any],
    values: Mapping[str, Iterable[EditedValue]],
) -> None:
    """That what was written reads as the source with the changes, before it gets its name."""
    expected = copy.deepcopy(dict(places))
    for where, changes in values.items():
        for change in changes:
            _set(expected[where], change)
    again = open_checkpoint(made)
    found = _read_places(again)
    # NaN equals nothing, and numpy has moved the module of its arrays.
    same = found == expected or _written_out(found) == _written_out(expected)
    if not same or again.tensors != stored.tensors:
        raise CheckpointError(
            f"the copy of {stored.directory} does not read as the original with the changes: a "
            "fault of megatron_ext. Nothing was left behind; please report it"
        )


def _written_out(places: Mapping[str, Any]) -> str:
    return repr(places).replace("numpy.core.", "numpy._core.")
