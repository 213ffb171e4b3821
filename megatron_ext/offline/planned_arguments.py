"""Fill in arguments that are missing on a planned run's command line, from the checkpoint."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.directories import Directories
from ..checkpoint.stored import StoredCheckpoint
from ..policy import request
from .command_line import FLAGS, CommandLine, Place, flag_of

#: Arguments that are meant to differ between runs; never filled in from the checkpoint.
OF_A_RUN = (
    "finetune",
    "no_load_optim",
    "override_opt_param_scheduler",
    "use_checkpoint_opt_param_scheduler",
    "load",
    "save",
    "ckpt_step",
    "override_ckpt_iteration",
)
#: Further arguments that are filled in if the command line is not that of a whole run.
_OF_THE_MODEL = (
    "optimizer",
    "tokenizer_type",
    "vocab_size",
    "make_vocab_size_divisible_by",
    "decoupled_weight_decay",
    "padded_vocab_size",
    "rampup_batch_size",
    "step_batch_size_schedule",
    "apply_wd_to_qk_layernorm",
    "use_mup",
    "hidden_size",
    "mup_base_hidden_size",
    "expert_tensor_parallel_size",
)
#: Arguments that determine the number of rows of the embedding.
_PADDING = frozenset(
    {
        "vocab_size",
        "make_vocab_size_divisible_by",
        "padded_vocab_size",
        "tensor_model_parallel_size",
    }
)
#: One argument of each tuple is enough. If it is given, the others are not filled in.
_ALTERNATIVES = (
    ("train_iters", "train_samples"),
    ("lr_decay_iters", "lr_decay_samples"),
    ("lr_warmup_iters", "lr_warmup_samples", "lr_warmup_fraction"),
    ("lr_wsd_decay_iters", "lr_wsd_decay_samples"),
)
#: Megatron's defaults of the flags above, unless they are None.
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
#: A schedule needs one argument of each tuple, also with the command line of a whole run.
_NEEDED = (("lr",), ("train_iters", "train_samples"), ("global_batch_size",))
#: Source of an assumed value that is neither the checkpoint's nor its optimizer's.
DEFAULT = "the default"


@dataclass(frozen=True)
class Assumption:
    """A value that is missing on the command line.

    Args:
        flag: Its flag.
        value: The assumed value.
        source: Its source.
    """

    flag: str
    value: Any
    source: str


@dataclass(frozen=True)
class PlannedArguments:
    """The arguments of a planned run.

    Args:
        values: The arguments as from Megatron's parser, with the assumed ones; `load` is the
            checkpoint.
        complete: Whether the command line is that of a whole run, so that missing arguments have
            Megatron's defaults.
        assumed: The values that were filled in.
        directories: The directories of the run.
        elsewhere: The directory that the run itself would load, if it is another one.
        unknown: Words that are not Megatron's flags, such as a script's own.
        parsed_by: Name of the parser.
    """

    values: argparse.Namespace
    complete: bool
    assumed: tuple[Assumption, ...]
    directories: Directories
    elsewhere: Path | None = None
    unknown: tuple[str, ...] = ()
    parsed_by: str = "megatron_ext"


def complete(line: CommandLine, place: Place, stored: StoredCheckpoint) -> PlannedArguments:
    """Fill in the arguments that are missing on a command line.

    Args:
        line: The parsed command line.
        place: The checkpoint's place, from `locate`.
        stored: The checkpoint.
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
                assumed.append(Assumption(flag_of(name), where[name], source))
                break
        else:
            if getattr(values, name, None) is None:
                setattr(values, name, _DEFAULTS.get(name))
    if values.weight_decay_incr_style == "constant":
        # The saved ones are what Megatron's validation has made of --weight-decay.
        for name in {"start_weight_decay", "end_weight_decay"} - given:
            setattr(values, name, None)
            assumed = [a for a in assumed if a.flag != flag_of(name)]
    if getattr(values, "optimizer_class", None) is None:
        values.optimizer_class = request.DEFAULT_CLASS
        assumed.append(Assumption("--optimizer-class", request.DEFAULT_CLASS, DEFAULT))
    if place.consistent:
        values.load, values.selective_where = str(place.directories.load), place.directories.where
    if place.directories.where == "own":
        # As in a run, --ckpt-step is the iteration at which the phase starts (hooks.directories).
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


def _is_whole(values: argparse.Namespace, given: frozenset[str]) -> bool:
    """Whether a command line can start a run: Megatron asserts these (validate_args)."""
    shape = "num_layers" in given or getattr(values, "use_checkpoint_args", False)
    return bool(shape and "micro_batch_size" in given)


def _wanted(
    values: argparse.Namespace, given: frozenset[str], whole: bool, saved: Mapping[str, Any]
) -> Iterator[str]:
    """Yield the arguments to fill in."""
    taken = superseded(given, saved)
    if whole:
        for names in _NEEDED:
            if not any(getattr(values, name, None) for name in names):
                yield from (name for name in names if name not in taken)
        return
    for name in (*FLAGS, *_OF_THE_MODEL):
        if name in OF_A_RUN:
            if getattr(values, name, None) is None:
                setattr(values, name, None)
        elif name not in given and name not in taken:
            yield name
        elif getattr(values, name, None) is None:
            setattr(values, name, _DEFAULTS.get(name))


def superseded(given: frozenset[str], saved: Mapping[str, Any]) -> set[str]:
    """Name the arguments that must not be filled in beside those that are given.

    Args:
        given: The destinations of the flags on the command line.
        saved: The checkpoint's arguments.
    """
    taken = {name for group in _ALTERNATIVES if given & set(group) for name in group}
    if saved.get("train_samples"):
        taken |= {"train_iters"} - given  # Megatron computes it, and saves it too
    if "global_batch_size" in given:
        taken |= {"step_batch_size_schedule"}  # Megatron refuses both
    if "tensor_model_parallel_size" in given:
        taken |= {"expert_tensor_parallel_size"}  # by default the same
    if given & _PADDING:
        taken |= {"padded_vocab_size"}
    return taken


def _saved(stored: StoredCheckpoint) -> Iterator[tuple[str, Any]]:
    """Yield the saved arguments that are plain data."""
    for name, value in stored.args.items():
        if isinstance(value, bool | int | float | str | list | tuple):
            yield name, value


def _from_state(stored: StoredCheckpoint) -> Iterator[tuple[str, Any]]:
    """Derive arguments from the state of optimizer and scheduler."""
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
    """Return the scheduler state of a checkpoint, or an empty mapping."""
    return stored.scheduler if isinstance(stored.scheduler, Mapping) else {}
