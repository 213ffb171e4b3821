"""Find a training script's arguments in the command line that starts it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

from ..errors import PolicyError
from ..policy.launch_line import without_launchers

#: Programs whose ``-m`` names a Python module.
_PYTHON = re.compile(r"(python|pypy)[\d.]*|torchrun")
#: Modules that start a script, which comes after them.
_STARTERS = ("torch.distributed.run", "torch.distributed.launch", "megatron_ext.launch")


def script_arguments(words: Sequence[str]) -> list[str]:
    """Return the arguments of the training script in a pasted command line.

    Understood are ``torchrun``, ``python`` and what is before them (``srun``, assignments of
    environment variables), this package's launcher and its flags, and text in one word as from
    ``"$(cat run.sh)"``, with backslashes at the ends of lines.

    Args:
        words: Arguments, or a whole command line.

    Raises:
        PolicyError: The first word is no flag, and no script is started.
    """
    found = [part for word in words for part in _split(word, alone=len(words) == 1)]
    if not found or found[0].startswith("-"):
        return found
    python = module = False
    launcher: int | None = None
    for at, word in enumerate(found):
        if module:
            module = False
            if word not in _STARTERS:
                return found[at + 1 :]
            launcher = at if word == "megatron_ext.launch" else launcher
        elif python and word in ("-m", "--module"):
            module = True
        elif word.endswith(".py") and not re.match(r"\w+=", word):
            before = [] if launcher is None else without_launchers(found[launcher + 1 : at])
            return before + found[at + 1 :]
        python = python or _PYTHON.fullmatch(word.rpartition("/")[2]) is not None
    raise PolicyError(
        f"{found[0]}: expected Megatron's arguments, or the command line of a run with its script "
        "(torchrun ... pretrain_gpt.py --lr 3e-5 ...); found neither a flag here nor a script that "
        "ends in .py after it. Give the arguments alone"
    )


def _split(word: str, *, alone: bool) -> list[str]:
    """Split a text that is the only word; drop the rest of a line's end."""
    joined = re.sub(r"\\\s*\n", " ", word)
    if alone and re.search(r"\s", joined):
        return shlex.split(joined)
    return [joined] if joined.strip().strip("\\") or not word else []
