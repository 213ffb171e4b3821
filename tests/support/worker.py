"""The process of `tests.support.pool` that imports Megatron and forks the ranks of each call."""

from __future__ import annotations

import gc
import importlib
import importlib.abc
import importlib.util
import logging
import os
import pickle
import signal
import sys
import traceback
import warnings
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any

from tests.support import te_extension

ROOT = Path(__file__).resolve().parents[2]


class _Forbidden(importlib.abc.MetaPathFinder):
    """Makes this package impossible to import."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> None:
        if name.split(".")[0] == "megatron_ext":
            raise ImportError("megatron_ext is not available in this process")


def adapt_to_cpu() -> None:
    """Install the CPU adaptations without importing the package they are a part of."""
    spec = importlib.util.spec_from_file_location("cpu_adapter", ROOT / "megatron_ext" / "cpu.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["cpu_adapter"] = module
    spec.loader.exec_module(module)
    stand_in = module._stand_in_for_fused_adam
    module._stand_in_for_fused_adam = lambda: _older_names() or stand_in()
    module.install()


def _older_names() -> None:
    """What older Megatrons lack, or need of older libraries."""
    import megatron.core.optimizer as optimizer
    import numpy as np

    if not hasattr(optimizer, "USING_PYTORCH_OPTIMIZER"):  # before 0.15
        optimizer.USING_PYTORCH_OPTIMIZER = optimizer.Adam.__module__.startswith("torch.")
    if not hasattr(np, "product"):  # numpy 2; before 0.16 core/dist_checkpointing/validation.py
        np.product = np.prod


class _Forking:
    """multiprocessing, with processes that are always forked."""

    def __init__(self, multiprocessing: Any) -> None:
        self._multiprocessing = multiprocessing

    def get_context(self, method: str | None = None) -> Any:
        return self._multiprocessing.get_context("fork")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._multiprocessing, name)


def ready_to_fork(*, ours: bool) -> None:
    """Do once what every rank would do, in a process that has imported Megatron.

    Args:
        ours: Whether this package may be imported.
    """
    if ours:
        for name in ("api", "hooks.installing", "resume.optimizer", "resume.replicated"):
            importlib.import_module(f"megatron_ext.{name}")
        importlib.import_module("megatron_ext.host.contract").contract_problems()
    _fork_for_saves()
    # Ranks would copy the pages of all these objects at their first collection.
    gc.collect()
    gc.freeze()


def _fork_for_saves() -> None:
    """Let a torch_dist save fork its helper process; spawned it imports torch and Megatron again.

    `_get_write_results_queue` asks for a spawned one up to 0.16.1, and where nothing else is asked
    for up to 0.19.2 (core/dist_checkpointing/strategies/filesystem_async.py:64).
    """
    module = importlib.import_module("megatron.core.dist_checkpointing.strategies.filesystem_async")
    module.mp = _Forking(module.mp)


def main(address: str, kind: str) -> None:
    connection = Client(address, family="AF_UNIX")
    if kind == "stock":
        sys.meta_path.insert(0, _Forbidden())
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    if with_te := te_extension.available():
        te_extension.install()
    adapt_to_cpu()
    if with_te:
        te_extension.keep_torch_layers()
    for name in _USED:
        with suppress(ImportError):  # older Megatrons lack some
            importlib.import_module(name)
    if kind == "bridge":
        from tests.support import bridge_stand_ins

        bridge_stand_ins.install()
        for name in ("pretrain", "gpt_step"):
            importlib.import_module(f"megatron.bridge.training.{name}")
    ready_to_fork(ours=kind != "stock")
    running: set[int] = set()
    while True:
        if connection.poll(0.05 if running else None):
            try:
                function, world, directory, kwargs = connection.recv()
            except EOFError:
                return
            pids = [_fork(function, rank, world, Path(directory), kwargs) for rank in range(world)]
            running.update(pids)
            connection.send(pids)
        for pid in tuple(running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                running.discard(pid)
                with suppress(OSError):
                    connection.send((pid, os.waitstatus_to_exitcode(status)))


#: What nearly every call imports.
_USED = (
    "megatron.core.dist_checkpointing.strategies.fully_parallel",
    "megatron.core.dist_checkpointing.strategies.torch",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.optimizer.distrib_optimizer",
    "megatron.core.pipeline_parallel",
    "numpy.testing",
    "tests.support.unsharded",
)


def _fork(function: str, rank: int, world: int, directory: Path, kwargs: dict[str, Any]) -> int:
    """A rank: it calls the function, leaves the result in a file, and waits to be ended.

    Its connections stay open until all ranks are done, as in a run.
    """
    pid = os.fork()
    if pid:
        with suppress(OSError):
            os.setpgid(pid, pid)
        return pid
    code = 1
    try:
        with suppress(OSError):
            os.setpgid(0, 0)
        result = _run(function, rank, world, str(directory / "store"), kwargs)
        file = directory / f"result{rank}"
        file.with_suffix(".new").write_bytes(pickle.dumps(result))
        file.with_suffix(".new").rename(file)
        code = 0
        sys.stdout.flush()
        signal.pause()
    finally:
        os._exit(code)
    raise AssertionError


def _run(function: str, rank: int, world: int, store: str, kwargs: dict[str, Any]) -> Any:
    import torch
    import torch.distributed as dist

    from tests.support.pool import Failure

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=90),
        )
        module, _, name = function.partition(":")
        return getattr(importlib.import_module(module), name)(**kwargs)
    except BaseException as e:
        return Failure(rank, type(e).__name__, str(e), traceback.format_exc())


if __name__ == "__main__":
    main(*sys.argv[1:])
