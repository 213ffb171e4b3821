"""A process that has imported Megatron and forks a rank for every run of one rank.

Importing takes 10 s of a core; the runs of `tests/test_launch.py` would spend most of CI on it. The
forked child does what ``python -m megatron_ext.launch ARGS`` does from there on.

Reads one JSON request a line: ``{"id", "argv", "log", "env"}``; answers ``{"id", "rc"}``.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback
from typing import Any


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    from megatron_ext import cpu

    cpu.install()
    import megatron.training.training  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _child(request)
        threading.Thread(target=_reap, args=(pid, request["id"], answers), daemon=True).start()


def _reap(pid: int, name: str, answers: Any) -> None:
    _, status = os.waitpid(pid, 0)
    answers.write(json.dumps({"id": name, "rc": os.waitstatus_to_exitcode(status)}) + "\n")


def _child(request: dict[str, Any]) -> None:
    os.setsid()
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdin = open(os.devnull)  # noqa: SIM115
    os.environ.update(request["env"])
    code = 1
    try:
        from megatron_ext import launch

        launch.main(request["argv"])
        code = 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
