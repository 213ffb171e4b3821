"""A process that has imported Megatron and forks the ranks of a run.

Importing takes 10 s of a core; most of CI would go to the imports of training runs. A forked
child does what ``python -m megatron_ext.launch ARGS`` does from there on.

Reads one JSON request a line: ``{"id", "argv", "logs", "env"}`` with one log file a rank; answers
``{"id", "rc"}``, the code of the first rank that failed, or 0.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from contextlib import suppress
from typing import Any

from tests.support import counting
from tests.support.worker import ready_to_fork

#: Environment variable: print how often the functions of `tests.support.counting` were called.
COUNT_CALLS = "MEGATRON_EXT_TEST_COUNT_CALLS"

#: What nearly every run imports of Megatron; its tokenizers import transformers, half of a run.
_USED = (
    "megatron.training.training",
    "megatron.core.datasets.blended_megatron_dataset_builder",
    "megatron.core.datasets.gpt_dataset",
    "megatron.core.tokenizers.text.text_tokenizer",
)

#: Seconds that the other ranks have to end in after one has failed.
GRACE = 60


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    from megatron_ext import cpu

    cpu.install()
    # emerging-optimizers, which Megatron has imported now, logs through absl and thereby configures
    # the root logger before Megatron's training does: its lines would be lost.
    logging.root.handlers.clear()
    for name in _USED:
        importlib.import_module(name)
    ready_to_fork(ours=True)
    for line in sys.stdin:
        request = json.loads(line)
        pids = []
        for rank, log in enumerate(request["logs"]):
            pid = os.fork()
            if pid == 0:
                _child(request, rank, log)
            pids.append(pid)
        threading.Thread(target=_reap, args=(pids, request["id"], answers), daemon=True).start()


def _reap(pids: list[int], name: str, answers: Any) -> None:
    """Wait for the ranks of a run, for no longer than `GRACE` once one has failed."""
    running, first, deadline = set(pids), 0, float("inf")
    while running:
        for pid in tuple(running):
            if not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                continue
            # What a save has started outlives its rank, in the rank's process group.
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            running.discard(pid)
            first = first or code
        if first and deadline == float("inf"):
            deadline = time.monotonic() + GRACE
        if time.monotonic() > deadline:
            for pid in running:
                with suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
        time.sleep(0.02)
    answers.write(json.dumps({"id": name, "rc": first}) + "\n")


def _child(request: dict[str, Any], rank: int, file: str) -> None:
    os.setsid()
    log = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdin = open(os.devnull)  # noqa: SIM115
    os.environ.update(
        request["env"],
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(len(request["logs"])),
        LOCAL_WORLD_SIZE=str(len(request["logs"])),
    )
    code, report = 1, None
    try:
        from megatron_ext import launch

        if os.environ.get(COUNT_CALLS):
            report = counting.start()
        launch.main(request["argv"])
        code = 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        if report is not None:
            report()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
