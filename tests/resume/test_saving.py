"""A save by parameter holds what the run has, in every layout of the buckets."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import FIRST, STEPS
from tests.support import saving_cases
from tests.support.cells import chosen, of_every_version
from tests.support.harness import Layout
from tests.support.pool import RankPool

FULL = Layout(format="fully_reshardable")
#: Layout, ranks, and whether buckets are padded, so that stock stores something else.
CELLS = {
    "several buckets, dp 3": (replace(FULL, overlap=True, hidden=12), 3, True),
    "several buckets, dp 2": (replace(FULL, overlap=True, hidden=12), 2, True),
    "pp 2, tied": (replace(FULL, pp=2, tied=True, hidden=12, vocab=60), 2, True),
    "experts": (replace(FULL, experts=4, ep=2, overlap=True, hidden=12), 2, True),
    "one bucket": (FULL, 2, False),
    "gated": (replace(FULL, gated=True, overlap=True, hidden=12), 2, True),
}
RAN: list[str] = []


def key_of(name: str) -> tuple[str, int | None]:
    """The key under which a parameter is stored, and its layer there."""
    found = re.match(r"decoder\.layers\.(\d+)\.(.*)", name)
    key, layer = (f"decoder.layers.{found[2]}", int(found[1])) if found else (name, None)
    key = key.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
    key = key.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")
    return key, layer


def differing(directory: str, state: dict[str, Any]) -> list[str]:
    """The parameters of which something else is stored than the run had."""
    stored = {
        key: saving_cases.stored(directory, key) for key in ("param", "exp_avg", "exp_avg_sq")
    }
    out = []
    for name, of_run in state.items():
        if ".experts." in name:
            continue
        key, layer = key_of(name)
        for what, tensors in stored.items():
            if key not in tensors:  # the last stage's copy of a tied embedding
                key = {"output_layer.weight": "embedding.word_embeddings.weight"}[key]
            value = tensors[key] if layer is None else tensors[key][layer]
            if not np.array_equal(value.reshape(of_run[what].shape), of_run[what]):
                out.append(f"{what} of {name}")
    return out


@pytest.mark.ranks
@pytest.mark.parametrize("name", of_every_version(CELLS, ["several buckets, dp 2"]))
def test_what_is_stored_is_what_the_run_has(
    name: str, stock: RankPool, ext: RankPool, tmp_path: Path
) -> None:
    layout, world, wrong = CELLS[name]
    kwargs: dict[str, Any] = {"layout": layout, "hyper": FIRST, "steps": STEPS}
    for pool, cases in ((stock, "mapped_stock"), (ext, "saving_cases")):
        here = str(tmp_path / cases)
        found = pool.run(f"tests.support.{cases}:phase_1", world, **kwargs, directory=here)[0]
        differ = differing(here, found["state"])
        assert bool(differ) == (wrong and pool is stock), differ
        assert pool is stock or found["said"] == ["a save"]
        # Any Megatron reads it, whether the package is installed or not.
        if pool is ext:
            one = replace(layout, pp=1, overlap=False, layers=2 * layout.pp)
            loaded = stock.run(
                "tests.support.mapped_stock:loaded",
                layout.ep,
                layout=one,
                hyper=FIRST,
                directory=here,
            )[0]
            for name_of_one, state in loaded["state"].items():
                for key, value in state.items():
                    np.testing.assert_array_equal(value, found["state"][name_of_one][key])
    RAN.append(name)


@pytest.mark.ranks
def test_every_layout_was_saved(request: pytest.FixtureRequest) -> None:
    assert len(CELLS) == 6
    assert len(RAN) == len(set(RAN)) == chosen(request, test_what_is_stored_is_what_the_run_has)
