"""Wrap the functions of megatron.training that load a checkpoint. Each gets the original."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..base import ranks
from ..base.log import say
from ..checkpoint import checksums
from ..checkpoint.store import read_file
from ..checkpoint.torch_file import require_torch_file
from ..errors import CheckpointError, MegatronExtError
from ..host.arguments import dropping_flag, global_args, needs_optimizer
from ..host.contract import TRAINING
from ..plan import resized
from ..resume import vocabulary
from ..resume.members import members_of
from ..resume.session import current
from . import counters, reading
from .session import require_built
from .sharded import no_optimizer_state

_PRETRAINED = "--pretrained-checkpoint"


def load_checkpoint(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `megatron.training.checkpointing.load_checkpoint`."""

    @functools.wraps(original)
    def load_checkpoint(
        ddp_model: Any, optimizer: Any, opt_param_scheduler: Any, *args: Any, **kwargs: Any
    ) -> Any:
        members = members_of(optimizer)
        if not members:
            if optimizer is not None:
                require_built()
            return original(ddp_model, optimizer, opt_param_scheduler, *args, **kwargs)
        megatron_args = global_args()  # None in a library's use
        where = getattr(megatron_args, kwargs.get("load_arg", "load"), None) or "its directory"
        dropped = _dropped(megatron_args, kwargs.get("load_arg", "load"))
        resume = members[0].resume
        if dropped and resume.policy.needs_optimizer:
            raise needs_optimizer(dropped, resume.policy)
        if not dropped:
            _require_legacy_files(megatron_args, kwargs.get("load_arg", "load"))
        current.resumed = None if dropped else resume
        with resume.loading(), _override_hidden(megatron_args):
            try:
                result = original(ddp_model, optimizer, opt_param_scheduler, *args, **kwargs)
            except KeyError as e:
                if e.args != ("optimizer",):
                    raise
                _raise_no_optimizer_state(where, e)
        if dropped and resume.complete:
            # A GPT that goes on as a HybridModel (training/checkpointing.py:2206, 0.19.2).
            say(f"megatron_ext: {dropped}: Megatron loads a GPT's optimizer state all the same")
        elif dropped == _PRETRAINED:
            say(f"megatron_ext: {dropped}: only its weights are loaded, the optimizer is new")
        elif dropped:
            say(f"megatron_ext: {dropped}: the checkpoint's Adam moments are dropped")
        elif _loaded_iteration() > 0 and not resume.complete:
            raise CheckpointError(
                f"a checkpoint was loaded from {where}, but no optimizer state came "
                "with it and the policy keeps the moments. A release checkpoint or one written "
                "with --no-save-optim has none: pass --no-load-optim to start with a new "
                "optimizer"
            )
        # For a legacy checkpoint stock reads the iteration again from the tracker file
        # (training/checkpointing.py:2587, 0.19.2).
        iteration = None if dropped else counters.after_the_load(resume, megatron_args)
        return result if iteration is None else (iteration, *result[1:])

    return load_checkpoint


def load_base_checkpoint(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `_load_base_checkpoint`, which returns the checkpoint's counters and arguments."""

    @functools.wraps(original)
    def load(load_dir: Any, args: Any, rank0: bool = False, *rest: Any, **kwargs: Any) -> Any:
        call = functools.partial(original, load_dir, args, rank0, *rest, **kwargs)
        file = _own_file(args, load_dir, rank0=rank0) if current.built else None
        if file is not None or (current.built and rank0):
            result = reading.together(call, file or Path(load_dir))
        else:
            result = call()
        if current.load is not None and not rank0 and result[0] is None:
            # Stock says so in one WARNING among hundreds of lines (_load_base_checkpoint,
            # training/checkpointing.py:1690, 0.19.2), and trains on from random weights.
            say(f"megatron_ext: NO CHECKPOINT in {load_dir}: a new run, nothing resumed")
        if current.load is not None and current.resumed is not None and not rank0:
            counters.before_the_load(current.resumed, load_dir, args, result[0])
        return result

    return load


def check_checkpoint_args(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `check_checkpoint_args`, which gets the saved arguments before the optimizer loads."""

    @functools.wraps(original)
    def check_checkpoint_args(checkpoint_args: Any, *args: Any, **kwargs: Any) -> Any:
        if (load := current.load) is not None:
            if load.counters is not None:
                load.batch_sizes = counters.batch_sizes(checkpoint_args, load.counters)
            _refuse_resized_legacy(checkpoint_args, global_args())
        return original(checkpoint_args, *args, **kwargs)

    return check_checkpoint_args


@contextlib.contextmanager
def _override_hidden(args: Any) -> Iterator[None]:
    """Hide --override-opt_param-scheduler from Megatron's load.

    With it, 0.20 writes --lr and --min-lr into every param_group after all is loaded, and the
    consumed samples into the scheduler (training/checkpointing.py:3010 of its main branch, #3720).
    Kept bounds, those of a group's own and a restarted schedule would be lost.

    Args:
        args: Megatron's arguments, or None.
    """
    given = getattr(args, "override_opt_param_scheduler", False)
    if given:
        args.override_opt_param_scheduler = False
    try:
        yield
    finally:
        if given:
            args.override_opt_param_scheduler = given


def _dropped(args: Any, load_arg: str) -> str | None:
    """Return the flag with which stock drops the optimizer's state, or None.

    Without a checkpoint of its own a run loads ``--pretrained-checkpoint`` as with ``--finetune``
    (training/checkpointing.py:2094, 0.19.2). A restart loads its own, with the optimizer.
    """
    flag = dropping_flag(args)
    if flag is None and getattr(args, "pretrained_checkpoint", None) is not None:
        checkpointing = importlib.import_module(f"{TRAINING}.checkpointing")
        own = checkpointing.checkpoint_exists(getattr(args, load_arg, None))
        return None if own else _PRETRAINED
    return flag


def _loaded_iteration() -> int:
    checkpointing = importlib.import_module(f"{TRAINING}.checkpointing")
    getter = getattr(checkpointing, "get_loaded_iteration", None)
    return (getter() if getter else None) or 0


def _raise_no_optimizer_state(where: Any, cause: KeyError) -> None:
    """Stop the ranks that are about to plan, then raise."""
    error = no_optimizer_state(where)
    try:
        ranks.stop_together("resume", error)
    except MegatronExtError as e:
        raise e from cause


def _require_legacy_files(args: Any, load_arg: str) -> None:
    """Raise on every rank if a legacy torch checkpoint lacks one rank's file.

    Stock ends that rank with exit code 0 and leaves the others waiting
    (training/checkpointing.py:1751-1754, 0.19.2).
    """
    checkpointing = importlib.import_module(f"{TRAINING}.checkpointing")
    load_dir = getattr(args, load_arg, None)
    error = None
    try:
        files = _legacy_files(checkpointing, args, load_dir)
        missing = [f for f in files if not os.path.isfile(f)]
        if missing:
            error = CheckpointError(
                f"the checkpoint in {load_dir} is not complete: {missing[0]} does not exist. "
                "Restore it; if only the optimizer's file is lost, --no-load-optim starts with a "
                "new optimizer (the Adam moments are then lost)"
            )
        else:
            check = checksums.require_sums if reading.verifies() else require_torch_file
            for file in files:
                read_file(Path(file), check)
    except CheckpointError as e:
        error = e
    except OSError as e:
        error = CheckpointError(f"the checkpoint in {load_dir} cannot be read: {e}")
    ranks.stop_together("checking that the checkpoint's files are there", error)


def _legacy_files(checkpointing: Any, args: Any, load_dir: Any) -> list[str]:
    """List the files that this rank loads of a legacy torch checkpoint."""
    if (iteration := _legacy_iteration(checkpointing, args, load_dir)) is None:
        return []
    model = checkpointing.get_checkpoint_name(load_dir, iteration, False)
    files = [model]
    if args.use_distributed_optimizer and _writes_optimizer_file():
        files.append(checkpointing.get_distributed_optimizer_checkpoint_name(model))
    return files


def _legacy_iteration(checkpointing: Any, args: Any, load_dir: Any) -> int | None:
    """Return the iteration of a legacy torch checkpoint; None if the directory has none."""
    if load_dir is None:
        return None
    tracker = checkpointing.get_checkpoint_tracker_filename(load_dir)
    if not os.path.isfile(tracker):
        return None
    # Megatron's `read_metadata` reduces over the ranks, which is not needed here.
    text = Path(tracker).read_text().strip()
    iteration = getattr(args, "ckpt_step", None) or (int(text) if text.isdigit() else None)
    if iteration is None:
        return None
    base = checkpointing.get_checkpoint_name(load_dir, iteration, False, return_base_dir=True)
    is_legacy = os.path.isdir(base) and any(n.startswith("mp_rank_") for n in os.listdir(base))
    return iteration if is_legacy else None


def _own_file(args: Any, load_dir: Any, *, rank0: bool) -> Path | None:
    """Return the file that this rank loads of a legacy torch checkpoint; None if it is none."""
    checkpointing = importlib.import_module(f"{TRAINING}.checkpointing")
    if (iteration := _legacy_iteration(checkpointing, args, load_dir)) is None:
        return None
    own = Path(checkpointing.get_checkpoint_name(load_dir, iteration, False))
    # Any rank reads the arguments of the first rank, whose directory has as many digits as ranks.
    return min(own.parent.parent.glob(f"mp_rank_*/{own.name}"), default=own) if rank0 else own


def _refuse_resized_legacy(saved: Any, args: Any) -> None:
    """Raise if a legacy torch checkpoint has another vocabulary size.

    Raises:
        CheckpointError: The optimizer file has buffers of the old size; on every rank.
    """
    before, now = (getattr(a, "padded_vocab_size", None) for a in (saved, args))
    if before is None or now is None or before == now or dropping_flag(args):
        return
    checkpointing = importlib.import_module(f"{TRAINING}.checkpointing")
    if _legacy_iteration(checkpointing, args, args.load) is not None:
        change = resized.RowChange("padded_vocab_size", int(before), int(now), 0)
        raise vocabulary.refusal(change, "legacy torch")


def _writes_optimizer_file() -> bool:
    parallel_state = importlib.import_module("megatron.core.parallel_state")
    return int(parallel_state.get_data_parallel_rank()) == 0
