"""What Megatron-Bridge saves in place of arguments is read as plain data, whatever is in it."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.checkpoint.run_config import RUN_CONFIG, TRAIN_STATE, arguments
from megatron_ext.errors import CheckpointError

#: As Bridge writes them, but for the many names that are not taken.
CONFIG = """
_target_: megatron.bridge.training.config.ConfigContainer
checkpoint:
  fully_parallel_save: true
  save: /runs/phase1
model:
  num_layers: 2
  num_moe_experts: null
  tensor_model_parallel_size: 2
  pipeline_model_parallel_size: 1
  should_pad_vocab: {pad}
  vocab_size: 128
  params_dtype:
    _call_: false
    _target_: torch.bfloat16
  timers:
    _call_: true
    _target_: megatron.core.timers.Timers
optimizer:
  adam_eps: 1.0e-08
  bf16: true
  lr: 0.001
  optimizer: adam
  weight_decay: 0
rng:
  seed: 1
scheduler:
  lr_decay_style: cosine
  lr_warmup_iters: 10
train:
  global_batch_size: 4
  rampup_batch_size:
  - 2
  - 2
  - 100
"""


def write(directory: Path, text: str) -> None:
    (directory / RUN_CONFIG).write_text(text)


def test_values_have_megatrons_names(tmp_path: Path) -> None:
    write(tmp_path, CONFIG.format(pad="false"))
    counters = {"consumed_train_samples": 12, "skipped_train_samples": 4, "step": 3}
    state: dict[str, Any] = {name: torch.tensor(value) for name, value in counters.items()}
    torch.save({**state, "do_train": torch.tensor(True)}, tmp_path / TRAIN_STATE)
    assert arguments(tmp_path) == {
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 1,
        "num_layers": 2,
        "vocab_size": 128,
        "padded_vocab_size": 128,
        "adam_eps": 1e-8,
        "lr": 0.001,
        "weight_decay": 0,
        "optimizer": "adam",
        "bf16": True,
        "lr_warmup_iters": 10,
        "lr_decay_style": "cosine",
        "global_batch_size": 4,
        "rampup_batch_size": [2, 2, 100],
        "seed": 1,
        "ckpt_fully_parallel_save": True,
        "save": "/runs/phase1",
        "consumed_train_samples": 12,
        "skipped_train_samples": 4,
    }


def test_a_padded_vocabulary_that_is_not_saved_is_unknown(tmp_path: Path) -> None:
    write(tmp_path, CONFIG.format(pad="true"))
    assert "padded_vocab_size" not in arguments(tmp_path)


def test_without_its_files_nothing_is_known(tmp_path: Path) -> None:
    assert arguments(tmp_path) == {}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("optimizer: {lr: true, min_lr: '0.1', adam_eps: [1]}", {}),
        ("train: {rampup_batch_size: [a], train_iters: 1.5, global_batch_size: 8}", 8),
        ("optimizer: 3\ntrain: [1]", {}),
        ("a: &a 8\ntrain: {global_batch_size: *a}", 8),
        ("optimizer: {lr: !!python/name:os.system '', bf16: !x {a: 1}}", {}),
        ("train: {<<: {train_iters: 1}, global_batch_size: 8}", 8),
    ],
)
def test_what_is_not_a_plain_value_is_left_out(tmp_path: Path, text: str, found: Any) -> None:
    write(tmp_path, text)
    assert arguments(tmp_path) == ({"global_batch_size": found} if found else {})


def test_nothing_of_a_config_is_run(tmp_path: Path) -> None:
    target = tmp_path / "made"
    write(tmp_path, f"model: !!python/object/apply:os.system ['touch {target}']\n")
    assert arguments(tmp_path) == {}
    assert not target.exists()


@pytest.mark.parametrize(
    "text",
    [
        "a: [",
        "- 1",
        "a: 1\n...\nb: \x00",
        "[" * 5000 + "]" * 5000,
        "a: " + "1" * 5000,
        "a: " + "x" * (1 << 20),
        "&a [*a]",
    ],
    ids=["cut off", "a list", "a NUL", "deep", "many digits", "large", "a circle"],
)
def test_a_damaged_config_is_an_error_that_names_it(tmp_path: Path, text: str) -> None:
    write(tmp_path, text)
    with pytest.raises(CheckpointError, match=RUN_CONFIG):
        arguments(tmp_path)


def test_a_damaged_train_state_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / TRAIN_STATE).write_bytes(b"PK\x03\x04")
    with pytest.raises(CheckpointError, match=TRAIN_STATE):
        arguments(tmp_path)
    torch.save([1], tmp_path / TRAIN_STATE)
    with pytest.raises(CheckpointError, match="expected a dict of Bridge's counters, found a list"):
        arguments(tmp_path)


def test_many_aliases_take_no_time(tmp_path: Path) -> None:
    lines = ["l0: &l0 [x, x]"]
    lines += [f"l{n}: &l{n} [*l{n - 1}, *l{n - 1}]" for n in range(1, 60)]
    merges = ["m0: &m0 {a: 1}"]
    merges += [f"m{n}: &m{n} {{<<: [*m{n - 1}, *m{n - 1}]}}" for n in range(1, 60)]
    write(tmp_path, "\n".join([*lines, *merges, "train: {global_batch_size: 8}"]))
    begun = os.times().user
    assert arguments(tmp_path) == {"global_batch_size": 8}
    assert os.times().user - begun < 5


def test_flipped_bits_end_in_values_or_in_an_error(tmp_path: Path) -> None:
    whole, chance, ended = CONFIG.format(pad="false").encode(), random.Random(0), set()
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(chance.randrange(1, 4)):
            damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        (tmp_path / RUN_CONFIG).write_bytes(damaged)
        try:
            ended.add(type(arguments(tmp_path)))
        except CheckpointError as e:
            ended.add(type(e))
    assert ended == {dict, CheckpointError}
