"""Parse the command line of a planned run, and find the checkpoint that it would load."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..checkpoint.directories import Directories, choose, holds, is_remote
from ..checkpoint.state import DirectoryRole
from ..errors import MegatronExtError, PolicyError
from ..host import arguments, contract
from ..policy.flags import add_flags

_PROG = "python -m megatron_ext plan"
_USAGE = "python -m megatron_ext plan CKPT [options] [Megatron arguments]"
#: How this package's flags begin.
_OURS = ("--selective-", "--no-selective-")
#: Megatron's flags that a plan depends on -> type of the value (training/arguments.py and
#: training/config/training_config.py, 0.19.2). Flags without a type are switches.
FLAGS: dict[str, type | None] = {
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
    "override_ckpt_iteration": int,
}
#: Flags whose spelling differs from their destination.
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


@dataclass(frozen=True)
class Place:
    """The checkpoint that a plan is made for.

    Args:
        directories: The directories of the run, if it loads this checkpoint.
        iteration: Its iteration; None for the newest.
        elsewhere: The directory that the run itself would load, if it is another one.
        consistent: Whether the directories of the command line are consistent.
    """

    directories: Directories
    iteration: int | None
    elsewhere: Path | None
    consistent: bool


@dataclass(frozen=True)
class CommandLine:
    """A parsed command line, before the checkpoint is read.

    Args:
        values: All arguments, including defaults.
        given: The destinations of the flags on the command line.
        unknown: Words that no parser knows.
        parsed_by: Name of the parser.
        alike: Unknown flag -> the flag of the parser that is most like it.
    """

    values: argparse.Namespace
    given: frozenset[str]
    unknown: tuple[str, ...]
    parsed_by: str
    alike: Mapping[str, str] = field(default_factory=dict)

    @property
    def unknown_flags(self) -> list[str]:
        """The flags among the unknown words."""
        return [word.partition("=")[0] for word in self.unknown if word.startswith("--")]

    def described(self, flag: str) -> str:
        """Name an unknown flag, with the one that may be meant."""
        return f"{flag} (did you mean {self.alike[flag]}?)" if flag in self.alike else flag

    def unknown_warning(self) -> str | None:
        """Warn about the unknown words; None if there are none."""
        if not self.unknown:
            return None
        words = " ".join(self.unknown[:20]) + (" ..." if len(self.unknown) > 20 else "")
        flags = ", ".join(map(self.described, self.unknown_flags)) or "these words"
        return (
            f"not looked at: {words}. {self.parsed_by} does not know {flags}: a mistake, or the "
            "training script's own, which a plan cannot know"
        )


def parse(words: Sequence[str]) -> CommandLine:
    """Parse the words after the checkpoint's name.

    Flags of optimizer, scheduler and this package are parsed without Megatron. If there are others,
    Megatron's own parser parses the whole line, if it is installed.

    Args:
        words: Megatron's arguments, as for a run.

    Raises:
        SystemExit: A flag is malformed. argparse has printed the error; the exit status is 2.
        PolicyError: ``--yaml-cfg`` is given, or a flag that begins like one of this package's and
            is none.
    """
    if any(word.partition("=")[0] == "--yaml-cfg" for word in words):
        raise PolicyError(
            "--yaml-cfg: with it Megatron replaces all parsed arguments by those of the YAML file. "
            "Give the arguments on the command line"
        )
    own = _read(_own_parser, words, "megatron_ext")
    wrong = [f for f in own.unknown_flags if f.startswith(_OURS)]
    if wrong:
        raise PolicyError(
            f"unknown flag: {', '.join(map(own.described, wrong))}. python -m megatron_ext.launch "
            "--help lists the flags of megatron_ext"
        )
    if not own.unknown or not contract.has_training():
        return own
    return _read(_megatron_parser, words, f"megatron-core {contract.megatron_version()}")


def _read(
    make: Callable[[], argparse.ArgumentParser], words: Sequence[str], by: str
) -> CommandLine:
    parser = make()
    values, unknown = parser.parse_known_args(list(words))
    bare = make()
    for action in bare._actions:
        action.default = argparse.SUPPRESS
    bare._defaults.clear()
    given, _ = bare.parse_known_args(list(words))
    line = CommandLine(values, frozenset(vars(given)), tuple(unknown), by)
    known = [flag for action in parser._actions for flag in action.option_strings]
    near = {f: difflib.get_close_matches(f, known, 1) for f in line.unknown_flags}
    return dataclasses.replace(line, alike={f: found[0] for f, found in near.items() if found})


def _own_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=_PROG, usage=_USAGE, add_help=False, allow_abbrev=False)
    for name, kind in FLAGS.items():
        flags = [f"--{flag}" for flag in _SPELLED.get(name, (name.replace("_", "-"),))]
        if kind is None:
            parser.add_argument(*flags, dest=name, action="store_true", default=None)
        else:
            parser.add_argument(*flags, dest=name, type=kind)
    return add_flags(parser)


def _megatron_parser() -> argparse.ArgumentParser:
    return add_flags(arguments.megatron_parser(_PROG, _USAGE))


def flag_of(name: str) -> str:
    """Return the flag of a destination, as Megatron spells it."""
    return "--" + _SPELLED.get(name, (name.replace("_", "-"),))[0]


def locate(line: CommandLine, path: str | Path, iteration: int | None = None) -> Place:
    """Find the checkpoint of a plan, and whether the run would load another one.

    Args:
        line: The parsed command line.
        path: The directory of the checkpoint, or that of one iteration.
        iteration: The iteration, if it is given by an option of the command.

    Raises:
        PolicyError: Two different iterations are named.
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
        consistent = False  # the preflight reports it with all other problems
    where: DirectoryRole = "load"
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
    """Split a path into the directory for ``--load`` and the iteration, if it names one.

    Args:
        path: The directory of a checkpoint, or that of one iteration.
    """
    path = Path(path)
    found = re.fullmatch(r"iter_(\d{7,})", path.name)
    if found and not holds(path):
        return path.parent, int(found[1])
    return path, None
