"""Count the calls of a few functions in one rank of a run, however they were imported."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from types import CodeType


def _counted() -> dict[CodeType, str]:
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    from megatron_ext.checkpoint import pickles, stored
    from megatron_ext.plan import preflight
    from megatron_ext.policy import from_flags, phase

    functions: dict[str, Callable[..., object]] = {
        "flags read": from_flags.request_from_args,
        "preflights": preflight.examine,
        "phases decided": phase.decide,
        "checkpoints opened": stored.open_checkpoint,
        "indices read": pickles.load_index,
        "indices read by torch": FileSystemReader.read_metadata,
    }
    return {function.__code__: name for name, function in functions.items()}


def start() -> Callable[[], None]:
    """Begin to count; what is returned prints the counts as one line of JSON."""
    names = _counted()
    counts = Counter(dict.fromkeys(names.values(), 0))
    tool = sys.monitoring.PROFILER_ID
    sys.monitoring.use_tool_id(tool, "counting")

    def called(code: CodeType, _: int) -> None:
        counts[names[code]] += 1

    sys.monitoring.register_callback(tool, sys.monitoring.events.PY_START, called)
    for code in names:
        sys.monitoring.set_local_events(tool, code, sys.monitoring.events.PY_START)
    return lambda: print(f"CALLS {json.dumps(counts)}", flush=True)
