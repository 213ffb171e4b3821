"""Install the wrappers in the imported Megatron, in memory only."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, NoReturn

from ..errors import HostError
from ..host.contract import CORE, TRAINING, check_contract, has_training
from ..policy.flags import add_flags, suggestions
from . import data_position, metadata, preflight, running
from .building import build_emerging, build_optimizer, chain
from .directories import choose_directories
from .loading import check_checkpoint_args, load_base_checkpoint, load_checkpoint
from .scheduling import load_scheduler
from .sharded import load_sharded


def install(*, arguments: bool = False) -> None:
    """Rebind the names that `CONTRACT` marks as rebound; safe to call again.

    Args:
        arguments: Whether to add this package's flags to Megatron's own parser. The launcher does;
            scripts that pass `add_arguments` as ``extra_args_provider`` do not need it.

    Raises:
        HostError: As for `check_contract`.
    """
    check_contract()
    core = importlib.import_module(CORE)
    _rebind(core, "_get_megatron_optimizer_based_on_param_groups", build_optimizer)
    if hasattr(core, "_get_megatron_emerging_optimizer"):
        _rebind(core, "_get_megatron_emerging_optimizer", build_emerging)
    chained = importlib.import_module(f"{CORE}.optimizer").ChainedOptimizer
    _rebind(chained, "__init__", chain)
    scheduler = importlib.import_module("megatron.core.optimizer_param_scheduler")
    _rebind(scheduler.OptimizerParamScheduler, "load_state_dict", load_scheduler)
    sharded = importlib.import_module("megatron.core.dist_checkpointing")
    _rebind(sharded, "load", load_sharded)
    _rebind(sharded, "load_content_metadata", metadata.content_metadata)
    if not has_training():
        return
    if arguments:
        _rebind(
            importlib.import_module(f"{TRAINING}.arguments"),
            "add_megatron_arguments",
            _add_arguments_too,
        )
    checkpointing = importlib.import_module(f"{TRAINING}.checkpointing")
    _rebind(checkpointing, "load_checkpoint", load_checkpoint)
    _rebind(checkpointing, "check_checkpoint_args", check_checkpoint_args)
    _rebind(checkpointing, "_load_base_checkpoint", load_base_checkpoint)
    _rebind(checkpointing, "_build_sharded_state_dict_metadata", metadata.save_metadata)
    training = importlib.import_module(f"{TRAINING}.training")
    _rebind(training, "setup_model_and_optimizer", preflight.setup)
    _rebind(training, "load_checkpoint", load_checkpoint)
    _rebind(training, "build_train_valid_test_data_loaders", data_position.loaders)
    _rebind(training, "get_train_valid_test_num_samples", data_position.sample_counts)
    _rebind(training, "train", running.train)


def _add_arguments_too(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `add_megatron_arguments`."""

    @functools.wraps(original)
    def add_megatron_arguments(parser: Any) -> Any:
        parser = choose_directories(add_flags(original(parser)))
        # argparse prints a usage of all of Megatron's flags before the error, on every rank.
        parser.error = functools.partial(_refuse, parser)
        return parser

    return add_megatron_arguments


def _refuse(parser: Any, message: str) -> NoReturn:
    """Raise what argparse found wrong with the script's arguments."""
    hint = ""
    if message.startswith("unrecognized arguments"):
        unknown = [word for word in message.split() if word.startswith("--")]
        if "--cpu" in unknown:
            hint = " --cpu is the launcher's: put it before the script's name."
        hint += suggestions(unknown, parser._option_string_actions)
    raise HostError(f"{parser.prog}: {message}.{hint}")


def _rebind(owner: ModuleType | type, name: str, wrap: Callable[[Any], Any]) -> None:
    current = getattr(owner, name)
    if hasattr(current, "__megatron_ext_original__"):
        return
    wrapped = wrap(current)
    wrapped.__megatron_ext_original__ = current
    setattr(owner, name, wrapped)
