"""A rank process of `tests.support.pool`."""

from __future__ import annotations

import gc
import importlib
import importlib.abc
import importlib.util
import logging
import os
import sys
import traceback
import warnings
from datetime import timedelta
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any

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


def fork_for_saves() -> None:
    """Fork the helper process of torch_dist saves; spawned it imports torch and Megatron again.

    `megatron.training.async_utils` asks for the same where it starts its own helper (0.19.2); the
    queue is then the one that saves find.
    """
    module = importlib.import_module("megatron.core.dist_checkpointing.strategies.filesystem_async")
    make = getattr(module, "get_write_results_queue", None)
    if make is not None:  # from 0.18; earlier ones always spawn
        make("fork")


def main(address: str, kind: str, index: str) -> None:
    connection = Client(address, family="AF_UNIX")
    os.environ["RANK"] = index
    if kind == "stock":
        sys.meta_path.insert(0, _Forbidden())
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    adapt_to_cpu()
    fork_for_saves()
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        connection.send(_run(*task))


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
    finally:
        _clean_up()


def _clean_up() -> None:
    import torch.distributed as dist

    if "megatron.core.parallel_state" in sys.modules:
        sys.modules["megatron.core.parallel_state"].destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
    # Models and optimizers hold their process groups, whose threads go on polling, in cycles.
    gc.collect()


if __name__ == "__main__":
    main(*sys.argv[1:])
