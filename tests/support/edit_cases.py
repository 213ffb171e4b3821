"""Edits that are killed: at each file operation in turn, in a child of this process.

``python -m tests.support.edit_cases SOURCE DIRECTORY`` edits into ``DIRECTORY/N/new`` and kills
itself before operation N = 1, 2, ... until one run completes. Prints the operations of that one.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint  # an edit needs it: imported once, not in every child

from megatron_ext.offline.edit import edit

SETTINGS = {"max_lr": 1e-3, "min_lr": 1e-4, "betas": (0.8, 0.9)}

#: What the interpreter announces before it does it, with the path that matters.
_EVENTS = {
    "os.mkdir": 0,
    "os.rename": 1,
    "os.link": 1,
    "os.chmod": 0,
    "os.utime": 0,
    "os.remove": 0,
}


class Operations:
    """Counts file operations, and kills this process before the last one allowed."""

    def __init__(self, allowed: int) -> None:
        self.allowed = allowed
        self.done: list[tuple[str, str]] = []
        sys.addaudithook(self.audit)
        self._fsync = os.fsync
        os.fsync = self.fsync
        torch.save = self.in_halves(torch.save)
        pickle.dump = self.in_halves(pickle.dump)

    def count(self, name: str, path: Any) -> None:
        self.done.append((name, os.fsdecode(path)))
        if len(self.done) == self.allowed:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in _EVENTS:
            self.count(event, arguments[_EVENTS[event]])
        elif event == "open" and isinstance(arguments[0], str | bytes | Path):
            path, _, flags = arguments
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                self.count("open", path)

    def fsync(self, descriptor: int) -> None:
        self.count("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
        self._fsync(descriptor)

    def in_halves(self, write: Callable[..., None]) -> Callable[..., None]:
        """Also kill where a file is half written."""

        def written(value: Any, file: Any) -> None:
            if isinstance(file, io.BytesIO):
                write(value, file)
                return
            buffer = io.BytesIO()
            write(value, buffer)
            data = buffer.getvalue()
            file.write(data[: len(data) // 2])
            file.flush()
            self.count("half", file.name)
            file.write(data[len(data) // 2 :])

        return written


def main(source: str, directory: str) -> None:
    number = 1
    while _killed(source, Path(directory), number):
        number += 1


def _killed(source: str, directory: Path, number: int) -> bool:
    (directory / str(number)).mkdir()
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGKILL
            return True
        assert status == 0
        return False
    code = 1
    try:
        operations = Operations(number)
        edit(source, directory / str(number) / "new", SETTINGS)
        done = list(operations.done)
        print(json.dumps(done), flush=True)
        code = 0
    finally:
        os._exit(code)


if __name__ == "__main__":
    main(*sys.argv[1:])
