"""The names of Megatron-Bridge that `hooks/bridge.py` uses, and the version it is tested with.

The files and lines in the references are those of megatron-bridge 0.6.2, below `megatron/bridge`.
"""

from __future__ import annotations

import importlib
import warnings

from packaging.version import Version

from ..errors import HostError
from .contract import HostName, problem_of

#: The version that the tests run with.
TESTED_BRIDGE = "0.6.2"

CHECKPOINTING = "megatron.bridge.training.checkpointing"
CONFIG = "megatron.bridge.training.config"
INSTANTIATING = "megatron.bridge.utils.instantiate_utils"
CHECKPOINT_FILES = "megatron.bridge.training.utils.checkpoint_utils"

BRIDGE_CONTRACT = (
    HostName(
        CHECKPOINTING,
        "create_checkpoint_manager",
        ("checkpoint_config",),
        reference="training/checkpointing.py:746; makes the manager that a config names",
    ),
    HostName(
        CHECKPOINTING,
        "DefaultCheckpointManager.load",
        ("ctx",),
        reference="training/checkpointing.py:707; loads before the data iterators are made",
    ),
    HostName(
        CHECKPOINTING,
        "DefaultCheckpointManager.save",
        ("ctx", "callback_manager"),
        reference="training/checkpointing.py:685; passed on",
    ),
    HostName(
        CHECKPOINTING,
        "DefaultCheckpointManager.finalize_async_saves",
        ("state", "blocking", "terminate"),
        reference="training/checkpointing.py:730; passed on",
    ),
    HostName(
        CHECKPOINTING,
        "DefaultCheckpointManager.checkpointing_context",
        reference="training/checkpointing.py:675; passed on",
    ),
    HostName(
        CHECKPOINTING,
        "CheckpointLoadContext.state",
        instance=True,
        reference="training/checkpointing.py:592; has the counters of the loaded checkpoint",
    ),
    HostName(
        CHECKPOINTING,
        "TrainState.step",
        instance=True,
        reference="training/state.py:48; the iteration, beside the three sample counters",
    ),
    HostName(
        CONFIG,
        "CheckpointConfig.custom_manager_class",
        instance=True,
        reference="training/config.py:533; names our manager",
    ),
    HostName(
        CONFIG,
        "CheckpointConfig.pretrained_checkpoint",
        instance=True,
        reference="training/config.py:500; Bridge loads it without its optimizer",
    ),
    HostName(
        CONFIG,
        "EnergonDatasetConfig",
        reference="data/builders/energon.py:126; has a data position of its own",
    ),
    HostName(
        INSTANTIATING,
        "register_allowed_target_prefix",
        ("prefix",),
        reference="utils/instantiate_utils.py:132; lets a config name our manager",
    ),
    HostName(
        CHECKPOINT_FILES,
        "checkpoint_exists",
        ("checkpoints_path",),
        reference="training/utils/checkpoint_utils.py:260; whether Bridge finds a checkpoint",
    ),
)


def bridge_version() -> str:
    """Return the version of the installed Megatron-Bridge.

    The local part is dropped: like Megatron, Bridge appends the commit of the repository in the
    current directory.

    Raises:
        HostError: It cannot be imported.
    """
    try:
        version = importlib.import_module("megatron.bridge").__version__
    except ImportError as e:
        raise HostError(
            f"megatron_ext.bridge: Megatron-Bridge cannot be imported: {e}. Install "
            f"megatron-bridge=={TESTED_BRIDGE}, or call megatron_ext.enable in another host"
        ) from e
    return Version(version).public


def check_bridge() -> None:
    """Compare `BRIDGE_CONTRACT` with the installed Megatron-Bridge; warn of an untested version.

    Raises:
        HostError: Bridge cannot be imported, or lacks a name or one of its parameters. The message
            has both versions.
    """
    found = bridge_version()
    if problems := [p for name in BRIDGE_CONTRACT if (p := problem_of(name))]:
        raise HostError(
            f"megatron_ext.bridge works with megatron-bridge {TESTED_BRIDGE}; the installed "
            f"megatron-bridge {found} lacks extension points that it uses:\n"
            + "\n".join(f"  {p}" for p in problems)
            + f"\nInstall megatron-bridge=={TESTED_BRIDGE}"
        )
    if found != TESTED_BRIDGE:
        warnings.warn(
            f"megatron-bridge {found} is not the version that megatron_ext.bridge is tested with "
            f"({TESTED_BRIDGE}); every name that it uses is there",
            stacklevel=3,
        )
