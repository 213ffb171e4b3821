"""The study's runs: one phase 1, then every variant of phase 2 from its checkpoint."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.demo import corpus
from megatron_ext.demo.runs import SCRIPT, Point, first_error, parse

MODEL = """
    --num-layers 2 --hidden-size 64 --num-attention-heads 4 --ffn-hidden-size 256
    --seq-length 64 --max-position-embeddings 64 --micro-batch-size 16 --global-batch-size 16
    --use-distributed-optimizer --ckpt-format torch_dist --distributed-backend gloo
    --tokenizer-type NullTokenizer --split 100,0,0 --num-workers 0
    --log-interval 1 --eval-iters 0 --eval-interval 100000 --save-interval 100000
    --lr 2e-3 --min-lr 2e-3 --lr-decay-style constant --lr-decay-iters 100000 --lr-warmup-iters 10
    --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95
    --attention-dropout 0.0 --hidden-dropout 0.0 --transformer-impl local
    --no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-persist-layer-norm
""".split()
OURS = "--optimizer-class megatron_ext.SelectiveAdam"
LARGER = "--global-batch-size 64"


@dataclass(frozen=True)
class Variant:
    """One way through the phase change.

    Args:
        name: For tables and plots.
        arguments: Beyond `MODEL`.
        baseline: The variant it is compared with.
    """

    name: str
    arguments: str
    baseline: str


SAME_BATCH, LARGER_BATCH = "keep", "batch x4, keep"
VARIANTS = (
    Variant(SAME_BATCH, OURS, SAME_BATCH),
    Variant("reset", f"{OURS} --selective-preset reset", SAME_BATCH),
    Variant("reset, re-warm-up 50", "--no-load-optim --lr-warmup-iters 50", SAME_BATCH),
    Variant("reset-momentum", f"{OURS} --selective-preset reset-momentum", SAME_BATCH),
    Variant(LARGER_BATCH, f"{OURS} {LARGER}", LARGER_BATCH),
    Variant(
        "batch x4, exp_avg_sq by rule",
        f"{OURS} {LARGER} --selective-preset batch-size 16 64 --selective-decline lr betas eps",
        LARGER_BATCH,
    ),
    Variant(
        "batch x4, preset batch-size",
        f"{OURS} {LARGER} --selective-preset batch-size 16 64",
        LARGER_BATCH,
    ),
)


@dataclass(frozen=True)
class Size:
    """How long the study is.

    Args:
        first: Iterations of phase 1.
        second: Iterations of phase 2.
        seeds: Of phase 2's data order, one run of each variant for each.
    """

    first: int = 400
    second: int = 150
    seeds: tuple[int, ...] = (11, 12, 13)


class Study:
    """Runs in a directory.

    Args:
        directory: For data, checkpoint and logs.
        size: How long.
    """

    def __init__(self, directory: Path, size: Size) -> None:
        self.directory = directory
        self.size = size
        (directory / "logs").mkdir(parents=True, exist_ok=True)
        self.tokens = corpus.build(directory / "data" / "stdlib")

    def phase_1(self) -> list[Point]:
        """Train and save the checkpoint that every variant starts from."""
        arguments = [*OURS.split(), "--seed", "1", "--train-iters", str(self.size.first)]
        return self._run("phase-1", [*arguments, "--save", str(self.directory / "checkpoint")])

    def phase_2(self, variant: Variant, seed: int) -> list[Point]:
        """Go on from the checkpoint; the seed decides the order of the data."""
        last = self.size.first + self.size.second
        arguments = [*variant.arguments.split(), "--seed", str(seed), "--no-load-rng"]
        arguments += ["--train-iters", str(last), "--override-opt_param-scheduler"]
        arguments += ["--load", str(self.directory / "checkpoint")]
        return self._run(f"{variant.name}-{seed}".replace(" ", "_"), arguments)

    def _run(self, key: str, arguments: list[str]) -> list[Point]:
        log = self.directory / "logs" / f"{key}.log"
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = str(probe.getsockname()[1])
        data = self.directory / "data"
        command = [
            *(sys.executable, "-m", "megatron_ext.launch", "--cpu", str(SCRIPT), *MODEL),
            *("--data-path", str(data / "stdlib"), "--data-cache-path", str(data / "cache")),
            *("--vocab-size", str(corpus.END_OF_DOCUMENT + 1), *arguments),
        ]
        rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        rank |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        with log.open("w") as stream:
            done = subprocess.run(
                command,
                stdout=stream,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **rank},
                check=False,
            )
        text = log.read_text(errors="replace")
        points = parse(text)
        if done.returncode or not points:
            raise SystemExit(f"{key} failed: {first_error(text)}; its log is {log}")
        return points
