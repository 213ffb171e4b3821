"""Damaged and made-up input of every kind: a clean error or an answer, in seconds.

`MEGATRON_EXT_FUZZ_SECONDS` is how long all of it takes (`make soak SECONDS=600`).
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import pickle
import random
import resource
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from megatron_ext.cli import main
from megatron_ext.errors import MegatronExtError
from megatron_ext.policy.document import to_dict
from megatron_ext.policy.yaml_file import dumps, loads
from tests.support import specimens
from tests.support.policy_strategies import POLICIES
from tests.support.reports import resume_report

ALL_SECONDS = float(os.environ.get("MEGATRON_EXT_FUZZ_SECONDS", "60"))
#: The most that one case and all cases of a kind may take.
SECONDS, BYTES = 10.0, 1 << 30

#: What stands in the place of anything.
ODD: tuple[Any, ...] = (
    *(None, True, -1, 0, 1 << 70, -(1 << 63), 1e308, float("nan"), float("-inf"), 0.5, 3 + 4j),
    *(
        "",
        "x",
        "\x1b[2J",
        "é\ud800",
        "9" * 5000,
        b"\xff" * 9,
        (),
        [],
        {},
        {1: 2},
        {"a": {}},
        [1, "a"],
    ),
    *((1, (2, (3,))), {"a", 1}, range(5), slice(1), torch.Size([3]), torch.float32, [[[[]]]] * 3),
)
#: Opcodes of pickles that do something.
OPCODES = b"(.0123]}()lcNRbhjqrsuot\x80\x85\x86\x87\x93\xff\0"
#: The same for YAML and JSON.
PLAIN = tuple(v for v in ODD if v is None or isinstance(v, bool | int | float | str | list | dict))


def changed(value: Any, rng: random.Random, odd: tuple[Any, ...]) -> Any:
    """Copy plain data with something else in one place."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        if rng.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if rng.random() < 0.05:
            return {**value, rng.choice((1, None, "x", "")): value[key]}
        return {**value, key: changed(value[key], rng, odd)}
    if isinstance(value, list | tuple) and value and rng.random() < 0.9:
        at = rng.randrange(len(value))
        items = [*value[:at], changed(value[at], rng, odd), *value[at + 1 :]]
        return items if isinstance(value, list) else tuple(items)
    if hasattr(value, "__dict__") and rng.random() < 0.9:
        made = copy.copy(value)
        if vars(made):
            key = rng.choice(list(vars(made)))
            object.__setattr__(made, key, changed(getattr(made, key), rng, odd))
        return made
    return rng.choice(odd)


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Copy bytes with some of them changed, doubled, moved or left out."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(out) + 1)
        size = rng.choice((1, 1, 2, 4, 16, 256))
        match rng.randrange(5):
            case 0 if at < len(out):
                out[at] ^= 1 << rng.randrange(8)
            case 1:
                out[at : at + size] = rng.randbytes(size)
            case 2:
                del out[at : at + size]
            case 3:
                out[at:at] = out[at : at + size] * rng.choice((1, 2, 50))
            case _:
                out[at : at + 1] = bytes([rng.choice(OPCODES)])
    return bytes(out)


def with_pickle(data: bytes, rng: random.Random) -> bytes:
    """Change the pickle in a file of torch.save, and let the file be whole."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(made, "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            if entry.filename.endswith("data.pkl"):
                content = mutated(content, rng)
            new.writestr(entry, content)
    return made.getvalue()


def saved(state: Any) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def run(words: list[str]) -> None:
    """Run a command; it ends with an answer or one clean error, in time."""
    begin, out, err = time.process_time(), io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(words)
    told = err.getvalue()
    assert status in (0, 1, 2), told
    assert "error: unexpected " not in told, told
    assert "Traceback" not in told, told
    assert status != 2 or "error: " in told or "REFUSED" in out.getvalue(), told
    assert time.process_time() - begin < SECONDS


def assert_clean(case: Callable[[random.Random], None], share: float, each: int = 1) -> None:
    """Try cases until the time is over; the number of a case that fails is in the error."""
    before, tried = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0
    begin = time.monotonic()
    while time.monotonic() - begin < ALL_SECONDS * share:
        try:
            case(random.Random(tried))
        except BaseException as e:
            e.add_note(f"case {tried}")
            raise
        tried += 1
    print(f"{each * tried} cases in {time.monotonic() - begin:.0f} s")
    assert each * tried >= ALL_SECONDS * share
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown * 1024 < BYTES


def parse(text: str) -> None:
    begin = time.process_time()
    with contextlib.suppress(MegatronExtError):
        loads(text)
    assert time.process_time() - begin < SECONDS


def test_policies() -> None:
    def case(rng: random.Random) -> None:
        @seed(rng.randrange(1 << 30))
        @settings(
            max_examples=20,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(policy=POLICIES, words=st.text("*&!<>{}[]:-,#'\"|%@`?~ \n0_x1.e", max_size=40))
        def tried(policy: Any, words: str) -> None:
            text = dumps(policy)
            parse(words)
            parse(text + words)
            parse(mutated(text.encode(), rng).decode(errors="replace"))
            content: Any = to_dict(policy)
            parse(yaml.safe_dump(changed(content, rng, PLAIN), allow_unicode=True))

        tried()

    assert_clean(case, 0.2, each=80)


#: Kind -> the form of checkpoint, and the file that is changed.
FILES = {
    ".metadata": ("common_state", ".metadata"),
    "common.pt": ("common.pt", "common.pt"),
    "common_state": ("common_state", specimens.STATE_FILE),
    "model_optim_rng.pt": ("torch", "mp_rank_00/model_optim_rng.pt"),
    "distrib_optim.pt": ("torch", "mp_rank_00/distrib_optim.pt"),
    "tensors": ("common.pt", specimens.TENSOR_FILE),
}


@pytest.mark.parametrize("kind", FILES)
def test_checkpoints(kind: str, tmp_path: Path) -> None:
    form, name = FILES[kind]
    root, other, out = (tmp_path / n for n in ("root", "other", "new"))
    specimens.specimen(form, other)
    path = specimens.specimen(form, root) / name
    data = path.read_bytes()
    commands = [
        *specimens.commands(root, other, out).values(),
        ["plan", str(root), *"--lr 1e-3 --train-iters 20 --global-batch-size 8".split()],
        ["convert", str(root), str(out), "--to", "fully_reshardable"],
    ]
    main(commands[-2])  # it imports Megatron, which takes its time once
    index = pickle.loads(data) if kind == ".metadata" else None
    state = None if kind in (".metadata", "tensors") else torch.load(path, weights_only=False)

    def case(rng: random.Random) -> None:
        how = rng.randrange(3)
        if how == 0 or (kind == "tensors"):
            found = mutated(data, rng)
        elif index is not None:
            with contextlib.suppress(Exception):  # what cannot be pickled is none
                path.write_bytes(pickle.dumps(changed(index, rng, ODD), rng.choice((2, 4))))
            found = None
        elif how == 1:
            found = with_pickle(data, rng)
        else:
            found = saved(changed(state, rng, ODD))
        if found is not None:
            path.write_bytes(found)
        run(rng.choice(commands))
        if out.exists():
            for file in sorted(out.rglob("*"), reverse=True):
                file.rmdir() if file.is_dir() else file.unlink()
            out.rmdir()

    assert_clean(case, 0.6 / len(FILES))


def test_reports(tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    document = resume_report().to_json()
    data = json.dumps(document).encode()
    path = tmp_path / "resume-report.json"

    def case(rng: random.Random) -> None:
        if rng.randrange(2):
            path.write_bytes(mutated(data, rng))
        else:
            content = json.loads(data)
            for _ in range(rng.choice((1, 3))):
                content = changed(content, rng, PLAIN)
            path.write_text(json.dumps(content))
        run(["report", str(tmp_path)])

    assert_clean(case, 0.2)
