"""The arguments of a resume that is only planned: given, taken from the checkpoint, or defaults.

The user gives the command line of the run, or only what is to change. What is missing then comes
from the arguments that are saved in the checkpoint, and every such value is told.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import host
from .arguments import add_flags
from .directories import Directories, choose, holds, is_remote
from .errors import MegatronExtError, PolicyError
from .phase import Where
from .stored import StoredCheckpoint

_PROG = "python -m megatron_ext plan"
_USAGE = "python -m megatron_ext plan CKPT [options] [Megatron arguments]"

#: Megatron's flags that a plan looks at, and what they take (training/arguments.py and
#: training/config/training_config.py, 0.19.2); without a type they are switches.
_FLAGS: dict[str, type | None] = {
    "lr": float,
    "min_lr": float,
    "decoupled_lr": float,
    "decoupled_min_lr": float,
    "weight_decay": float,
    "start_weight_decay": float,
    "end_weight_decay": float,
    "weight_decay_incr_style": str,
    "adam_beta1": float,
    "adam_beta2": float,
    "adam_eps": float,
    "clip_grad": float,
    "lr_decay_style": str,
    "lr_wsd_decay_style": str,
    "lr_warmup_init": float,
    "lr_warmup_fraction": float,
    "lr_warmup_iters": int,
    "lr_warmup_samples": int,
    "lr_decay_iters": int,
    "lr_decay_samples": int,
    "lr_wsd_decay_iters": int,
    "lr_wsd_decay_samples": int,
    "train_iters": int,
    "train_samples": int,
    "global_batch_size": int,
    "tensor_model_parallel_size": int,
    "pipeline_model_parallel_size": int,
    "expert_model_parallel_size": int,
    "use_distributed_optimizer": None,
    "bf16": None,
    "fp16": None,
    "finetune": None,
    "no_load_optim": None,
    "override_opt_param_scheduler": None,
    "use_checkpoint_opt_param_scheduler": None,
    "load": str,
    "save": str,
    "ckpt_step": int,
}

#: Flags that are spelled in another way than their destination.
_SPELLED = {
    "override_opt_param_scheduler": (
        "override-opt_param-scheduler",
        "override-opt-param-scheduler",
    ),
    "use_checkpoint_opt_param_scheduler": (
        "use-checkpoint-opt_param-scheduler",
        "use-checkpoint-opt-param-scheduler",
    ),
}

#: What runs differ in by intention: never taken from the checkpoint.
_OF_A_RUN = (
    "finetune",
    "no_load_optim",
    "override_opt_param_scheduler",
    "use_checkpoint_opt_param_scheduler",
    "load",
    "save",
    "ckpt_step",
)

#: Taken from the checkpoint beside the flags above, where the command line is not a run's.
_OF_THE_MODEL = (
    "optimizer",
    "tokenizer_type",
    "vocab_size",
    "make_vocab_size_divisible_by",
    "decoupled_weight_decay",
    "padded_vocab_size",
    "rampup_batch_size",
    "step_batch_size_schedule",
    "use_mup",
    "mup_width_mult",
)

#: What the number of rows of the embedding follows from.
_PADDING = frozenset(
    {
        "vocab_size",
        "make_vocab_size_divisible_by",
        "padded_vocab_size",
        "tensor_model_parallel_size",
    }
)

#: One of each is enough; the others are then not taken from elsewhere.
_ALTERNATIVES = (
    ("train_iters", "train_samples"),
    ("lr_decay_iters", "lr_decay_samples"),
    ("lr_warmup_iters", "lr_warmup_samples", "lr_warmup_fraction"),
    ("lr_wsd_decay_iters", "lr_wsd_decay_samples"),
)

#: Megatron's defaults of the flags above, where they are not None.
_DEFAULTS: dict[str, Any] = {
    "min_lr": 0.0,
    "weight_decay": 0.01,
    "weight_decay_incr_style": "constant",
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_eps": 1e-8,
    "clip_grad": 1.0,
    "lr_decay_style": "linear",
    "lr_wsd_decay_style": "exponential",
    "lr_warmup_init": 0.0,
    "lr_warmup_iters": 0,
    "lr_warmup_samples": 0,
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "use_distributed_optimizer": False,
    "optimizer": "adam",
}

#: Without these there is no schedule, whatever the command line; of several one is enough.
_NEEDED = (("lr",), ("train_iters", "train_samples"), ("global_batch_size",))


@dataclass(frozen=True)
class Assumption:
    """A value that the command line does not have.

    Args:
        flag: Its flag.
        value: What is assumed.
        source: Where it comes from.
    """

    flag: str
    value: Any
    source: str


@dataclass(frozen=True)
class PlannedArguments:
    """What a plan is made from.

    Args:
        values: As Megatron's parser gives them, with what was assumed; `load` is the checkpoint.
        complete: Whether the command line is a run's, so that Megatron's defaults hold for what it
            leaves out.
        assumed: What comes from the checkpoint.
        directories: Where the run would load from and save to.
        elsewhere: The directory that the run itself would load, where it is another one.
        unknown: Words that are no flags of Megatron's, for example a script's own.
        parsed_by: Who has read the command line.
    """

    values: argparse.Namespace
    complete: bool
    assumed: tuple[Assumption, ...]
    directories: Directories
    elsewhere: Path | None = None
    unknown: tuple[str, ...] = ()
    parsed_by: str = "megatron_ext"


@dataclass(frozen=True)
class Place:
    """Which checkpoint is planned for.

    Args:
        directories: Where the run would load from and save to, if it loads this checkpoint.
        iteration: Which one; the newest by default.
        elsewhere: The directory that the run itself would load, where it is another one.
        consistent: Whether the directories of the command line go together.
    """

    directories: Directories
    iteration: int | None
    elsewhere: Path | None
    consistent: bool


@dataclass(frozen=True)
class CommandLine:
    """A command line that has been parsed, before the checkpoint was looked at.

    Args:
        values: All arguments, defaults included.
        given: The destinations of the flags that are there.
        unknown: Words that no parser knows.
        parsed_by: Who has read it.
    """

    values: argparse.Namespace
    given: frozenset[str]
    unknown: tuple[str, ...]
    parsed_by: str


def parse(words: Sequence[str]) -> CommandLine:
    """Parse what comes after the checkpoint's name.

    Flags of optimizer, scheduler and this package are read without Megatron; where there are others
    its own parser reads the whole line, if it is installed.

    Args:
        words: Megatron's arguments, as for a run.

    Raises:
        SystemExit: A flag is malformed; argparse has said so, and the exit status is 2.
        PolicyError: ``--yaml-cfg``.
    """
    if any(word.partition("=")[0] == "--yaml-cfg" for word in words):
        raise PolicyError(
            "--yaml-cfg: Megatron then replaces all parsed arguments by the YAML file's. Give the "
            "arguments on the command line"
        )
    own = _read(_own_parser, words, "megatron_ext")
    if not own.unknown or not host.has_training():
        return own
    return _read(_megatron_parser, words, f"megatron-core {host.megatron_version()}")


def complete(line: CommandLine, place: Place, stored: StoredCheckpoint) -> PlannedArguments:
    """Fill what a command line leaves out, from the checkpoint.

    Args:
        line: What `parse` gave.
        place: What `locate` gave.
        stored: The checkpoint there.
    """
    values, given = argparse.Namespace(**vars(line.values)), line.given
    whole = _is_whole(values, given)
    assumed = []
    saved = dict(_saved(stored))
    state = dict(_from_state(stored))
    for name in _wanted(values, given, whole, saved):
        for where, source in ((saved, "the checkpoint's arguments"), (state, "its optimizer")):
            if where.get(name) is not None:
                setattr(values, name, where[name])
                assumed.append(Assumption(_flag(name), where[name], source))
                break
        else:
            if getattr(values, name, None) is None:
                setattr(values, name, _DEFAULTS.get(name))
    if getattr(values, "optimizer_class", None) is None:
        values.optimizer_class = host.DEFAULT_CLASS
        assumed.append(Assumption("--optimizer-class", host.DEFAULT_CLASS, "no other was given"))
    if place.consistent:
        values.load, values.selective_where = str(place.directories.load), place.directories.where
    if place.directories.where == "own":
        # As in a run: --ckpt-step says where the phase starts (arguments.choose_directories).
        values.selective_start_step, values.ckpt_step = values.ckpt_step, None
    else:
        values.ckpt_step = place.iteration
    return PlannedArguments(
        values=values,
        complete=whole,
        assumed=tuple(assumed),
        directories=place.directories,
        elsewhere=place.elsewhere,
        unknown=line.unknown,
        parsed_by=line.parsed_by,
    )


def _read(
    make: Callable[[], argparse.ArgumentParser], words: Sequence[str], by: str
) -> CommandLine:
    values, unknown = make().parse_known_args(list(words))
    bare = make()
    for action in bare._actions:
        action.default = argparse.SUPPRESS
    bare._defaults.clear()
    given, _ = bare.parse_known_args(list(words))
    return CommandLine(values, frozenset(vars(given)), tuple(unknown), by)


def _own_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=_PROG, usage=_USAGE, add_help=False, allow_abbrev=False)
    for name, kind in _FLAGS.items():
        flags = [f"--{flag}" for flag in _SPELLED.get(name, (name.replace("_", "-"),))]
        if kind is None:
            parser.add_argument(*flags, dest=name, action="store_true", default=None)
        else:
            parser.add_argument(*flags, dest=name, type=kind)
    return add_flags(parser)


def _megatron_parser() -> argparse.ArgumentParser:
    return add_flags(host.megatron_parser(_PROG, _USAGE))


def _is_whole(values: argparse.Namespace, given: frozenset[str]) -> bool:
    """Whether a command line can start a run: Megatron asserts these (validate_args)."""
    shape = "num_layers" in given or getattr(values, "use_checkpoint_args", False)
    return bool(shape and "micro_batch_size" in given)


def _wanted(
    values: argparse.Namespace, given: frozenset[str], whole: bool, saved: Mapping[str, Any]
) -> Iterator[str]:
    """What is to be filled in."""
    taken = {name for group in _ALTERNATIVES if given & set(group) for name in group}
    if saved.get("train_samples"):
        taken |= {"train_iters"} - given  # Megatron computes it, and saves it too
    if given & _PADDING:
        taken |= {"padded_vocab_size"}
    if whole:
        for names in _NEEDED:
            if not any(getattr(values, name, None) for name in names):
                yield from (name for name in names if name not in taken)
        return
    for name in (*_FLAGS, *_OF_THE_MODEL):
        if name in _OF_A_RUN:
            if getattr(values, name, None) is None:
                setattr(values, name, None)
        elif name not in given and name not in taken:
            yield name
        elif getattr(values, name, None) is None:
            setattr(values, name, _DEFAULTS.get(name))


def _saved(stored: StoredCheckpoint) -> Iterator[tuple[str, Any]]:
    """The saved arguments that are plain data."""
    for name, value in stored.args.items():
        if isinstance(value, bool | int | float | str | list | tuple):
            yield name, value


def _from_state(stored: StoredCheckpoint) -> Iterator[tuple[str, Any]]:
    """What optimizer and scheduler say of the arguments they were built with."""
    state = state_of(stored)
    groups = [g for optimizer in stored.optimizers for g in optimizer.groups]
    group = groups[0] if groups else {}
    yield "lr", state.get("max_lr", group.get("max_lr"))
    yield "min_lr", state.get("min_lr", group.get("min_lr"))
    yield "lr_decay_style", state.get("lr_decay_style")
    yield "weight_decay", state.get("end_wd")
    yield "start_weight_decay", state.get("start_wd")
    yield "end_weight_decay", state.get("end_wd")
    yield "weight_decay_incr_style", state.get("wd_incr_style")
    yield "adam_eps", group.get("eps")
    betas = group.get("betas")
    if isinstance(betas, list | tuple) and len(betas) == 2:
        yield "adam_beta1", betas[0]
        yield "adam_beta2", betas[1]
    position, iteration = state.get("num_steps"), stored.iteration
    if isinstance(position, int) and iteration and position % iteration == 0:
        size = position // iteration
        yield "global_batch_size", size
        for name, steps in (
            ("train_iters", "wd_incr_steps"),
            ("lr_decay_iters", "lr_decay_steps"),
            ("lr_warmup_iters", "lr_warmup_steps"),
        ):
            if size and isinstance(state.get(steps), int) and state[steps] % size == 0:
                yield name, state[steps] // size


def state_of(stored: StoredCheckpoint) -> Mapping[str, Any]:
    """The scheduler state of a checkpoint; empty where there is none."""
    return stored.scheduler if isinstance(stored.scheduler, Mapping) else {}


def _flag(name: str) -> str:
    return "--" + _SPELLED.get(name, (name.replace("_", "-"),))[0]


def locate(line: CommandLine, path: str | Path, iteration: int | None = None) -> Place:
    """Say what a run with this command line that loads a certain checkpoint would load.

    Args:
        line: What `parse` gave.
        path: The directory of the checkpoint, or one iteration's own.
        iteration: Which one, if that is asked beside the command line.
    """
    values = line.values
    root, own = split_iteration(path)
    load, save, start = (getattr(values, n, None) for n in ("load", "save", "selective_from"))
    start_dir = None if start is None else Path(start)
    chosen, consistent = None, True
    try:
        elsewhere = getattr(values, "non_persistent_global_ckpt_dir", None)
        chosen = choose(load, save, start, elsewhere).load
    except MegatronExtError:
        consistent = False  # the preflight says so, beside whatever else is wrong
    where: Where = "load"
    if start_dir is not None:
        where = "start" if _same(start_dir, root) else "load"
        if any(d is not None and _same(Path(d), root) for d in (load, save)):
            where = "own"
    other = chosen if chosen is not None and not _same(chosen, root) else None
    if other is not None and (is_remote(str(other)) or not (other.is_dir() and holds(other))):
        other = None
    step = None if where == "own" else getattr(values, "ckpt_step", None)
    named = [n for n in (own, iteration, step or None) if n is not None]
    if len(set(named)) > 1:
        raise PolicyError(
            f"iterations {' and '.join(map(str, named))}: expected one, named by the directory, "
            "--iteration or --ckpt-step"
        )
    directories = Directories(root, None if save is None else Path(save), where, start_dir)
    return Place(directories, named[0] if named else None, other, consistent)


def _same(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()


def split_iteration(path: str | Path) -> tuple[Path, int | None]:
    """A directory as ``--load`` is given it, and the iteration if it is one iteration's own.

    Args:
        path: Either of the two.
    """
    path = Path(path)
    found = re.fullmatch(r"iter_(\d{7,})", path.name)
    if found and not holds(path):
        return path.parent, int(found[1])
    return path, None
