"""The commands of the README, as they stand, with what they print beside them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.runs import needs_training
from tests.support.training import ROOT, SCRIPT, environment, words

README = ROOT / "README.md"
#: A run of 20 iterations that has been stopped after 10.
ARGS = (
    "--bf16 --use-distributed-optimizer --ckpt-format torch_dist "
    "--train-iters 20 --lr-decay-iters 20 --exit-interval 10 --lr 3e-4 --min-lr 3e-5"
)
#: What differs where the commands run: no GPU, and one rank instead of eight.
HERE = {
    "--nproc-per-node 8": "--nproc-per-node 1",
    "-m megatron_ext.launch": "-m megatron_ext.launch --cpu",
}


def blocks() -> list[tuple[str, str]]:
    """Language and text of each block."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", README.read_text(), re.DOTALL | re.MULTILINE)


def require_printed(expected: str, output: str) -> None:
    """Require a block's lines in an output, one below the other.

    A line of dots stands for any lines, and dots in a line for any text.
    """
    lines = [line.rstrip() for line in output.splitlines()]
    at, anywhere = 0, True
    for wanted in expected.splitlines():
        if wanted == "...":
            anywhere = True
            continue
        pattern = ".*".join(map(re.escape, wanted.rstrip().split("...")))
        found = [i for i in range(at, len(lines)) if re.fullmatch(pattern, lines[i])]
        assert found, f"not printed: {wanted!r}\n{output[-5000:]}"
        assert anywhere or found[0] == at, f"expected {wanted!r}, found {lines[at]!r}"
        at, anywhere = found[0] + 1, False


class Shell:
    """Runs commands in a directory with a script, arguments and a checkpoint of phase 1."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        tools = directory / "bin"
        tools.mkdir()
        for name, module in (("python", ""), ("torchrun", "-m torch.distributed.run --standalone")):
            (tools / name).write_text(f'#!/bin/sh\nexec {sys.executable} {module} "$@"\n')
            (tools / name).chmod(0o755)
        (directory / "pretrain_gpt.py").symlink_to(SCRIPT)
        arguments = " ".join(words(ARGS, directory / "report"))
        self._before = f"ARGS=({arguments})\n"
        self._environment = environment({"PATH": f"{tools}:{os.environ['PATH']}", "COLUMNS": "80"})

    def run(self, command: str, *, status: int = 0) -> str:
        done = subprocess.run(
            ["bash", "-c", self._before + command],
            cwd=self.directory,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=200,
        )
        assert done.returncode == status, done.stdout[-5000:]
        return done.stdout


def here(command: str) -> str:
    for there, replacement in HERE.items():
        command = command.replace(there, replacement)
    return command


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """A shell where phase 1 has been trained by stock's optimizer."""
    out = Shell(tmp_path_factory.mktemp("readme"))
    first = 'torchrun --nproc-per-node 8 -m megatron_ext.launch pretrain_gpt.py "${ARGS[@]}"'
    out.run(f"{here(first)} --save phase1")
    return out


def test_the_first_lines_are_what_a_search_finds_and_the_page_is_short() -> None:
    words_of_page = README.read_text().split()
    assert len(words_of_page) < 900
    first = " ".join(words_of_page[:200])
    assert "KeyError: (None, " in first
    assert "overriding learning rate value to" in first
    assert "--optimizer-class megatron_ext.SelectiveAdam --selective-from" in first


@pytest.mark.e2e
@needs_training
def test_every_command_prints_what_stands_beside_it(shell: Shell) -> None:
    """In the order in which a reader would type them."""
    bash = [text for language, text in blocks() if language == "bash"]
    printed = [text for language, text in blocks() if language == "text"]
    (run,) = (text for text in bash if "megatron_ext.launch" in text)
    plan, diff = (text for text in bash if text.startswith("python -m megatron_ext "))
    _, looked, ran, compared = printed
    require_printed(looked, shell.run(plan))
    require_printed(ran, shell.run(here(run)))
    require_printed(compared, shell.run(diff, status=1))
    others = [text for text in bash if text not in (run, plan, diff)]
    assert [text.split()[0] for text in others] == ["pip", "make"]
