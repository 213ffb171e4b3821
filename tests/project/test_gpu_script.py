"""scripts/gpu, with stand-ins for nvidia-smi, nvcc and Python."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON = r"""#!/bin/sh
case "$*" in
*get_device_capability*) echo 9.0 ;;
*sys.version*) echo python 3.12.3 torch 2.11.0 ;;
*)
  echo "ran: $* arch=$TORCH_CUDA_ARCH_LIST kernel=$MEGATRON_EXT_KERNEL" \
    "commit=$MEGATRON_EXT_COMMIT" ;;
esac
case "$*" in *"{fails}"*) exit 3 ;; esac
"""


def run(
    directory: Path, *arguments: str, card: str = "Some Card 80GB", fails: str = "nothing"
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """The script's result, and what it ran."""
    tools = directory / "bin"
    tools.mkdir()
    smi = f"echo '{card}'" if card else "exit 9"
    for name, text in (
        ("nvidia-smi", f"#!/bin/sh\n{smi}\n"),
        ("nvcc", "#!/bin/sh\necho release 13.0\n"),
        ("python3", PYTHON.replace("{fails}", fails)),
    ):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    done = subprocess.run(
        [ROOT / "scripts" / "gpu", *arguments, directory / "out"],
        env={"PATH": f"{tools}:{os.environ['PATH']}", "MEGATRON_EXT_COMMIT": "abc"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done, [line for line in done.stdout.splitlines() if line.startswith("ran: ")]


def test_it_builds_tests_and_measures_and_writes_everything_down(tmp_path: Path) -> None:
    done, ran = run(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    built, tested, measured = ran
    assert "setup.py build_ext --inplace --force arch=9.0" in built
    assert "-m gpu" in tested
    assert "not compute_sanitizer" in tested
    assert "kernel=native" in tested
    assert f"benchmarks.kernel --device cuda --rounds 5 --out {tmp_path / 'out'}" in measured
    assert "commit=abc" in measured
    log = (tmp_path / "out" / "log.txt").read_text()
    assert log.startswith("card: Some Card 80GB\ndriver: Some Card 80GB\ncommit: abc\n")
    assert [line for line in log.splitlines() if line.startswith("ran: ")] == ran


def test_the_sanitizer_takes_the_place_of_the_benchmark(tmp_path: Path) -> None:
    done, ran = run(tmp_path, "--sanitize")
    assert done.returncode == 0
    assert len(ran) == 2
    assert "-k compute_sanitizer" in ran[1]
    assert (tmp_path / "out" / "log-sanitize.txt").is_file()


@pytest.mark.parametrize(
    ("fails", "steps"), [("build_ext", 1), ("-m pytest", 3), ("benchmarks", 3)]
)
def test_a_step_that_fails_shows_in_the_exit_status(tmp_path: Path, fails: str, steps: int) -> None:
    done, ran = run(tmp_path, fails=fails)
    assert done.returncode == 1
    assert len(ran) == steps
    assert done.stdout.count("exit status 3") == 1


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done, ran = run(tmp_path, card="")
    assert done.returncode == 2
    assert "no GPU: nvidia-smi failed" in done.stderr
    assert ran == []
