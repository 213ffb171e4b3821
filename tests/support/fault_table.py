"""Damage every kind of file of real checkpoints, and say what each command and a run make of it.

``python -m tests.support.fault_table`` writes the whole table into the documentation.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from megatron_ext.cli import main

from . import flips
from .damages import DAMAGES
from .pool import ROOT
from .runs import TOKENS
from .training import Training, Zygote

PAGE = ROOT / "docs" / "reference" / "faults.md"
PHASE_1 = "--bf16 --use-distributed-optimizer --lr 3e-4 --min-lr 3e-5 --lr-decay-iters 20"
PHASE_2 = f"{PHASE_1} --lr 3e-5 --train-iters 5 --optimizer-class megatron_ext.SelectiveAdam"
#: Checkpoint -> arguments of its run of two ranks.
CHECKPOINTS = {
    "dp_reshardable": "--ckpt-format torch_dist",
    "fully_reshardable": "--ckpt-format torch_dist --dist-ckpt-optim-fully-reshardable "
    "--tensor-model-parallel-size 2",
    "legacy": "--ckpt-format torch --tensor-model-parallel-size 2",
}
ITERATION = "iter_0000003"
#: Name of the file in the table -> its path below the directory of ``--load``.
TORCH_DIST = {
    "tracker": "latest_checkpointed_iteration.txt",
    "metadata.json": f"{ITERATION}/metadata.json",
    ".metadata": f"{ITERATION}/.metadata",
    "first .distcp": f"{ITERATION}/__0_0.distcp",
    "last .distcp": f"{ITERATION}/__1_0.distcp",
}
LEGACY = {
    "tracker": "latest_checkpointed_iteration.txt",
    "model_optim_rng.pt, rank 0": f"{ITERATION}/mp_rank_00/model_optim_rng.pt",
    "model_optim_rng.pt, rank 1": f"{ITERATION}/mp_rank_01/model_optim_rng.pt",
    "distrib_optim.pt, rank 1": f"{ITERATION}/mp_rank_01/distrib_optim.pt",
}
#: What reads no tensor.
OFFLINE = ("inspect", "diff", "plan", "edit")
COMMANDS = (*OFFLINE, "verify", "run", "run --selective-verify")
#: Outcome -> what it means.
OUTCOMES = {
    "error": "one error names the file; a run ends on every rank",
    "found": "the command reports it: `verify` the item, `diff` the difference",
    "not read": "the command does not read these bytes",
    "harmless": "the run trains as without the fault, bit for bit: nobody needs these bytes",
    "as stock": "a bit of a tensor that the run loads as it is, as stock does; `verify` and "
    "`--selective-verify` find it",
    "RAW": "an error that does not name the file, or that only some ranks have",
    "HUNG": "no end within two minutes",
    "ACCEPTED": "taken for right",
}
#: Outcomes that must not be.
WRONG = ("RAW", "HUNG", "ACCEPTED")


@dataclass(frozen=True)
class Fault:
    """One damaged file.

    Args:
        checkpoint: Key of `CHECKPOINTS`.
        file: Key of `TORCH_DIST` or `LEGACY`.
        damage: Key of `DAMAGES`, or ``a bit of ...``.
        number: Which of several random bits.
    """

    checkpoint: str
    file: str
    damage: str
    number: int = 0

    @property
    def path(self) -> str:
        """Path of the file below the directory of ``--load``."""
        return {**TORCH_DIST, **LEGACY}[self.file]


def faults() -> list[Fault]:
    """All of them."""
    found = []
    for checkpoint in CHECKPOINTS:
        files = LEGACY if checkpoint == "legacy" else TORCH_DIST
        for file, path in files.items():
            found += [Fault(checkpoint, file, damage) for damage in DAMAGES]
            bits = {"the file": 6} if path.endswith("metadata") else {}
            if path.endswith((".distcp", ".pt")):
                bits = {"a tensor": 4, "a pickle": 4, "no record": 2}
            found += [
                Fault(checkpoint, file, f"a bit of {of}", number)
                for of, count in bits.items()
                for number in range(count)
            ]
    return found


@dataclass
class Table:
    """Tries faults.

    Args:
        zygote: Forks the runs.
        directory: For checkpoints and logs.
        outcomes: Fault and command -> outcome.
        told: What a wrong outcome has printed.
    """

    zygote: Zygote
    directory: Path
    outcomes: dict[tuple[Fault, str], str] = field(default_factory=dict)
    told: dict[tuple[Fault, str], str] = field(default_factory=dict)
    _sound: dict[str, list[str]] = field(default_factory=dict)
    _number: Iterator[int] = field(default_factory=itertools.count)

    def source(self, checkpoint: str) -> Path:
        """The undamaged checkpoint, which is made at the first call."""
        root = self.directory / checkpoint
        if not root.exists():
            arguments = f"{PHASE_1} {CHECKPOINTS[checkpoint]} --train-iters 3 --save {root}"
            made = self._run(arguments)
            assert made.returncode == 0, made.log[-3000:]
            sound = self._run(f"{PHASE_2} {CHECKPOINTS[checkpoint]} --load {root}")
            assert sound.returncode == 0, sound.log[-3000:]
            self._sound[checkpoint] = sound.exact_losses
            assert len(sound.exact_losses) == 2
        return root

    def _run(self, arguments: str) -> Training:
        directory = self.directory / f"run{next(self._number)}"
        start = self.zygote.run
        return start(
            directory, arguments, launcher="--cpu", script=ROOT / TOKENS, world=2, timeout=120
        )

    def try_one(self, fault: Fault) -> None:
        """Damage a copy of the checkpoint and try every command on it."""
        source = self.source(fault.checkpoint)
        place = Path(tempfile.mkdtemp(dir=self.directory))
        root = place / "root"
        shutil.copytree(source, root)
        of_tensor = _damage(fault, root)
        for command in COMMANDS:
            if command.startswith("run"):
                outcome, told = self._of_run(fault, command, root)
            else:
                outcome, told = _of_command(fault, command, root, source, place / "new")
            if outcome in ("ACCEPTED", "harmless") and of_tensor:
                others = {"run": "as stock", "run --selective-verify": "ACCEPTED"}
                outcome = "not read" if command in OFFLINE else others.get(command, outcome)
            elif outcome == "ACCEPTED" and command in OFFLINE and not _read(fault):
                outcome = "not read"
            self.outcomes[fault, command] = outcome
            if outcome in WRONG:
                self.told[fault, command] = told
        self._judge(fault)
        shutil.rmtree(place)

    def _judge(self, fault: Fault) -> None:
        """Say what it means that an offline command has accepted a file, by what the others did."""
        found = {command: self.outcomes[fault, command] for command in COMMANDS}
        harmless = found["run"] == "harmless"
        # The plans of all ranks are at the end of the index. Only torch reads them, and `verify`.
        in_plans = fault.file == ".metadata" and found["verify"] == "found"
        for command, outcome in found.items():
            if outcome == "ACCEPTED" and harmless:
                self.outcomes[fault, command] = "harmless"
            elif outcome == "ACCEPTED" and in_plans and command in OFFLINE:
                self.outcomes[fault, command] = "not read"

    def _of_run(self, fault: Fault, command: str, root: Path) -> tuple[str, str]:
        verify = command.removeprefix("run")
        arguments = f"{PHASE_2} {CHECKPOINTS[fault.checkpoint]} --load {root}{verify}"
        try:
            run = self._run(arguments)
        except AssertionError as e:
            return "HUNG", str(e)
        if run.returncode == 0:
            same = run.exact_losses == self._sound[fault.checkpoint]
            return "harmless" if same else "ACCEPTED", run.log
        name = Path(fault.path).name
        # A bit of a tensor may be found by what it does to a parameter, whose name is told.
        words = ("CheckpointError", "AgreementError", "error: ")
        # The launcher's line on other ranks than 0 is cut.
        line = "launch: error on rank "
        clean = all(
            line in text
            or ((name in text or "a tensor" in fault.damage) and any(w in text for w in words))
            for text in run.ranks.values()
        )
        return "error" if clean and len(run.ranks) == 2 else "RAW", run.log


def _read(fault: Fault) -> bool:
    """Whether offline commands read more of the file than its size or its end."""
    return not fault.path.endswith((".distcp", "distrib_optim.pt", "mp_rank_01/model_optim_rng.pt"))


def _damage(fault: Fault, root: Path) -> bool:
    """Damage the file; returns whether only elements of a tensor differ."""
    path = root / fault.path
    if not fault.damage.startswith("a bit of "):
        DAMAGES[fault.damage](path)
        return False
    chance = random.Random(f"{fault}")
    of = fault.damage.removeprefix("a bit of ")
    if of == "the file":
        flips.flip(path, chance.randrange(path.stat().st_size), chance.randrange(8))
        return False
    records = [r for r in flips.records(root / ITERATION) if r.path == path]
    if of == "no record":
        inside = {b for r in records for b in range(r.begin, r.begin + r.size)}
        outside = [b for b in range(path.stat().st_size) if b not in inside]
        flips.flip(path, chance.choice(outside), chance.randrange(8))
        return False
    tensor = of == "a tensor"
    kind = "/data/" if tensor else "/data.pkl"
    record = chance.choice([r for r in records if kind in r.name])
    flips.flip(path, record.begin + chance.randrange(record.size), chance.randrange(8))
    return tensor


def _of_command(fault: Fault, command: str, root: Path, other: Path, out: Path) -> tuple[str, str]:
    words: Mapping[str, list[str]] = {
        "inspect": [str(root)],
        "diff": [str(root), str(other)],
        "plan": [str(root), "--lr", "3e-5"],
        "edit": [str(root), "--out", str(out), "--set", "max_lr=1e-3"],
        "verify": [str(root)],
    }
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        status = main([command, *words[command]])
    shutil.rmtree(out, ignore_errors=True)
    told, error = stdout.getvalue(), stderr.getvalue()
    name = Path(fault.path).name
    if status == 2 and error.startswith("error: ") and name in error and "unexpected" not in error:
        return "error", error
    if (command, status) == ("verify", 2) and name in told:
        return "found", told
    if command in ("diff", "verify") and status == 1:
        return "found", told
    # A forecast of a changed lr has no warning; 1 would be one.
    return "RAW" if status == 2 else "ACCEPTED", told + error


def page(outcomes: Mapping[tuple[Fault, str], str]) -> str:
    """The table as Markdown."""
    counts = Counter(outcomes.values())
    bits = Counter(outcomes[f, c] for f, c in outcomes if f.damage.startswith("a bit"))
    lines = [
        "# What becomes of a damaged checkpoint",
        "",
        "`make faults` wrote this page: three checkpoints of two ranks, every kind of file, "
        f"{len({f for f, _ in outcomes})} faults, {len(COMMANDS)} commands each, megatron-core "
        f"{_version()}. `tests/checkpoint/test_faults.py` tries a part of it again.",
        "",
        "| outcome | times | with a flipped bit | meaning |",
        "|---|---|---|---|",
        *(f"| {o} | {counts[o]} | {bits[o]} | {meaning} |" for o, meaning in OUTCOMES.items()),
        "",
    ]
    for checkpoint in CHECKPOINTS:
        lines += [f"## {checkpoint}", ""]
        lines += ["| file | fault | " + " | ".join(f"`{c}`" for c in COMMANDS) + " |"]
        lines += ["|---|---|" + "---|" * len(COMMANDS)]
        rows = dict.fromkeys((f.file, f.damage) for f, _ in outcomes if f.checkpoint == checkpoint)
        for file, damage in rows:
            cells = [_cell(outcomes, checkpoint, file, damage, c) for c in COMMANDS]
            lines += [f"| {file} | {damage} | " + " | ".join(cells) + " |"]
        lines += [""]
    return "\n".join(lines)


def _cell(
    outcomes: Mapping[tuple[Fault, str], str], checkpoint: str, file: str, damage: str, command: str
) -> str:
    found = Counter(
        outcome
        for (f, c), outcome in outcomes.items()
        if (f.checkpoint, f.file, f.damage, c) == (checkpoint, file, damage, command)
    )
    if sum(found.values()) == 1:
        return next(iter(found))
    return ", ".join(f"{count} {outcome}" for outcome, count in sorted(found.items()))


def _version() -> str:
    from megatron_ext.host.contract import megatron_version

    return str(megatron_version())


def _generate() -> None:
    """Try every fault, two at a time, and write the page."""
    zygote = Zygote()
    with tempfile.TemporaryDirectory() as directory:
        table = Table(zygote, Path(directory))
        for checkpoint in CHECKPOINTS:
            table.source(checkpoint)
        wanted = faults()
        for number, fault in enumerate(wanted):
            table.try_one(fault)
            found = [table.outcomes[fault, c] for c in COMMANDS]
            print(f"{number + 1}/{len(wanted)} {fault}: {', '.join(found)}", flush=True)
            for command in COMMANDS:
                if (fault, command) in table.told:
                    print(f"--- {command}\n{table.told[fault, command][-4000:]}", flush=True)
    zygote.close()
    PAGE.write_text(page(table.outcomes))


if __name__ == "__main__":
    _generate()
