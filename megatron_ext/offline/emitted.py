"""Write the command line of a planned run, from the words that were given and the checkpoint."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ..checkpoint.placeholders import Placeholder
from ..checkpoint.run_config import RUN_CONFIG
from ..checkpoint.stored import StoredCheckpoint
from ..errors import CheckpointError, HostError
from ..host import arguments, contract
from ..policy.yaml_file import dumps
from .command_line import CommandLine, flag_of, parse
from .forecast_model import Forecast
from .planned_arguments import OF_A_RUN, superseded

#: The script is not in a checkpoint.
_SCRIPT = "pretrain_gpt.py"
#: Saved arguments that say where and how the checkpoint's run was started.
_NOT_EMITTED = {
    *OF_A_RUN,
    "inprocess_active_world_size",
    "local_rank",
    "no_load_rng",
    "non_persistent_global_ckpt_dir",
    "padded_vocab_size",
    "pretrained_checkpoint",
    "skip_train",
    "use_checkpoint_args",
    "use_mp_args_from_checkpoint_args",
    "yaml_cfg",
}
#: Saved argument -> the one that Megatron's validation has copied into it. Some must not be given.
_COPIES = {
    "encoder_num_layers": "num_layers",
    "encoder_seq_length": "seq_length",
    "end_weight_decay": "weight_decay",
    "eval_global_batch_size": "global_batch_size",
    "eval_micro_batch_size": "micro_batch_size",
    "expert_tensor_parallel_size": "tensor_model_parallel_size",
    "num_query_groups": "num_attention_heads",
    "start_weight_decay": "weight_decay",
}
_DTYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.uint8: "fp8",
}
#: Every run has them, and Megatron has no defaults.
_REQUIRED = ("num_layers", "hidden_size", "num_attention_heads", "micro_batch_size")
#: Ranks of one node if the checkpoint's run had more than one.
_OF_A_NODE = 8
_WIDTH = 78


def policy_of(found: Forecast) -> str:
    """Write the policy as YAML.

    Args:
        found: The forecast, without errors.
    """
    assert found.policy is not None  # else there is an error
    return dumps(found.policy).removesuffix("\n")


def command_of(found: Forecast, words: Sequence[str]) -> tuple[str, list[str]]:
    """Write the torchrun line of a planned run.

    Args:
        found: The forecast.
        words: Megatron's arguments, as they were given.

    Returns:
        The command, on lines that end in a backslash; then notes about what it leaves open.

    Raises:
        HostError: Megatron's training part is not installed, so that its flags are not known.
        CheckpointError: The checkpoint does not have the arguments of a run.
    """
    line = parse(words)
    notes = [f"{_SCRIPT}: a checkpoint does not name its script; write yours there"]
    saved: list[list[str]] = []
    if not found.arguments.complete:
        _require_arguments(found.stored, line)
        saved = [*_saved_words(found.stored.args, line, notes)]
    own = _own_words(found, line)
    if not line.values.save:
        notes.append("no --save is given: this run would save no checkpoint")
    given = [[*group] for group in _by_flag([*words, *own])]
    return _folded([*_launcher(found.stored.args, notes), *saved, *given]), notes


def _require_arguments(stored: StoredCheckpoint, line: CommandLine) -> None:
    """Refuse a command whose missing arguments nobody knows."""
    if not contract.has_training():
        raise HostError(
            "--emit-command: Megatron's flags are not known, because megatron.training cannot be "
            "imported. Install it, or give the whole command line of the run"
        )
    missing = [n for n in _REQUIRED if n not in line.given and stored.args.get(n) is None]
    bridge = (stored.directory / RUN_CONFIG).is_file()
    if missing or bridge:
        what = f"no {', '.join(map(flag_of, missing))}"
        raise CheckpointError(
            f"--emit-command: expected the arguments of a Megatron-LM run in {stored.directory}, "
            f"found {f'the {RUN_CONFIG} of Megatron-Bridge' if bridge else what}. Give the whole "
            "command line of the run"
        )


def _launcher(saved: Mapping[str, Any], notes: list[str]) -> Iterator[list[str]]:
    world = saved.get("world_size")
    yield ["torchrun"]
    if isinstance(world, int) and world > _OF_A_NODE and world % _OF_A_NODE == 0:
        nodes = world // _OF_A_NODE
        notes.append(f"start it on each of {nodes} nodes, with MASTER_ADDR set to the first")
        yield ["--nnodes", str(nodes)]
        yield ["--nproc-per-node", str(_OF_A_NODE)]
        yield ["--rdzv-backend", "c10d"]
        yield ["--rdzv-endpoint", "$MASTER_ADDR:29500"]
    else:
        yield ["--nproc-per-node", str(world) if isinstance(world, int) else "gpu"]
    # A run without a GPU, which needs the launcher's option, is one over gloo.
    on_cpu = ["--cpu"] if saved.get("distributed_backend") == "gloo" else []
    yield ["-m", "megatron_ext.launch", *on_cpu, _SCRIPT]


def _own_words(found: Forecast, line: CommandLine) -> Iterator[str]:
    """Yield the flags that make a run load this checkpoint."""
    values = found.arguments.values
    if "optimizer_class" not in line.given:
        yield from ("--optimizer-class", str(values.optimizer_class))
    if not {"load", "selective_from"} & line.given:
        yield from ("--load", str(found.arguments.directories.load))
    if values.ckpt_step and "ckpt_step" not in line.given:
        yield from ("--ckpt-step", str(values.ckpt_step))


def _saved_words(
    saved: Mapping[str, Any], line: CommandLine, notes: list[str]
) -> Iterator[list[str]]:
    """Yield the flags of all saved arguments that are not Megatron's defaults."""
    left = {*_NOT_EMITTED, *line.given, *superseded(line.given, saved)}
    left |= {copy for copy, of in _COPIES.items() if saved.get(copy) == saved.get(of)}
    unwritten = []
    for action in arguments.megatron_parser("", "")._actions:
        name = action.dest
        if name in left or saved.get(name) is None:
            continue
        text = _text_of(action, saved[name])
        if text == _text_of(action, action.default):
            continue
        found = None if text is None else _words_of(action, saved[name], text)
        if found:
            left.add(name)
            yield found
        elif found is None and action.default is not None:
            unwritten.append(action.option_strings[0])
    if unwritten:
        notes.append(f"not plain data in the checkpoint, so left out: {', '.join(unwritten)}")


def _text_of(action: argparse.Action, value: Any) -> str | list[str] | None:
    """Write a value as words for an action; None if it is not plain data."""
    if isinstance(value, list | tuple) and action.nargs not in (None, 0):
        return [str(v) for v in value]
    if isinstance(value, torch.dtype):
        return _DTYPES.get(value)
    for choice in action.choices or ():  # members of an enum, which is saved with its value
        number = value.placeholder_arguments[:1] if isinstance(value, Placeholder) else ()
        if hasattr(choice, "name") and (choice is value or (choice.value,) == number):
            return str(choice.name)
    if isinstance(value, list | tuple | dict):  # parsed from one word
        return str(value).replace(" ", "")
    return None if isinstance(value, Placeholder) else str(value)


def _words_of(action: argparse.Action, value: Any, text: str | list[str]) -> list[str] | None:
    """Write an action's words; empty if another action of the same name has to, None if unknown."""
    option = action.option_strings[0]
    if isinstance(action, argparse.BooleanOptionalAction):
        return [option if value else next(o for o in action.option_strings if o[:5] == "--no-")]
    if action.nargs == 0:
        return [option] if value is action.const else []
    if isinstance(text, list):
        return [option, *text]
    if callable(action.type) and isinstance(value, list | tuple | dict):
        try:
            if action.type(text) != value:
                return None
        except (TypeError, ValueError, SyntaxError):
            return None
    return [f"{option}={text}"] if text.startswith("-") else [option, text]


def flag_words(flag: str, value: Any) -> list[str]:
    """Write an argument as words of a command line.

    Args:
        flag: The flag.
        value: Its value. A switch that is off has no words, and none is for what is not a flag.
    """
    if flag == "--decoupled-weight-decay":  # the name of a flag that turns it off differs
        return []
    if isinstance(value, bool):
        return [flag] if value else []
    values = value if isinstance(value, list | tuple) else [value]
    return [flag, *map(str, values)]


def _by_flag(words: Sequence[str]) -> Iterator[list[str]]:
    """Yield each flag with its values."""
    group: list[str] = []
    for word in words:
        if word.startswith("--") and group:
            yield group
            group = []
        group.append(word)
    if group:
        yield group


def _folded(groups: Sequence[Sequence[str]]) -> str:
    """Join words to lines of a shell command; a flag and its values stay on one line."""
    lines = [""]
    for group in groups:
        text = " ".join('"$MASTER_ADDR:29500"' if w[:1] == "$" else shlex.quote(w) for w in group)
        if lines[-1] and len(lines[-1]) + len(text) > _WIDTH - 2:
            lines.append("   ")
        lines[-1] += f" {text}" if lines[-1] else text
    return " \\\n".join(lines)
