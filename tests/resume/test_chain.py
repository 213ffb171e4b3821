"""Phase after phase after phase: the state is what one process without a stop has.

`MEGATRON_EXT_CHAIN` is the number of phases (`make soak PHASES=100`).
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.resume.test_resume import assert_same_state
from tests.support import chain
from tests.support.harness import Layout
from tests.support.pool import RankPool

pytestmark = pytest.mark.ranks

PHASES = int(os.environ.get("MEGATRON_EXT_CHAIN", "12"))
STEPS = 2
#: Growth of the memory of a rank over the second half of a long chain: less than one model's.
FLAT = 8 << 20


def test_a_chain_of_phases_is_one_run(stock: RankPool, ext: RankPool, tmp_path: Path) -> None:
    layout, world = Layout(), 2
    wanted = stock.run(
        "tests.support.chain_stock:by_hand",
        world,
        layout=layout,
        count=PHASES,
        steps=STEPS,
        timeout=60 + 10 * PHASES,
    )
    found = ext.run(
        "tests.support.chain_ours:resumed",
        world,
        layout=layout,
        count=PHASES,
        steps=STEPS,
        directory=str(tmp_path),
        timeout=60 + 10 * PHASES,
    )
    kinds = {(p.moments, p.saved_as) for p in chain.phases(PHASES)}
    assert len(kinds) >= min(PHASES, 7)
    for rank in range(world):
        assert len(found[rank]) == len(wanted[rank]) == PHASES
        for number, (ours, by_hand) in enumerate(zip(found[rank], wanted[rank], strict=True)):
            assert ours["losses"] == by_hand["losses"], number
            assert_same_state(ours["state"], by_hand["state"])
        memory = [phase["memory"] for phase in found[rank]]
        half = memory[len(memory) // 2 :]
        print(
            f"rank {rank}: {PHASES} phases equal; memory {memory[0] >> 20} MiB after the first, "
            f"{half[0] >> 20} in the middle, {half[-1] >> 20} at the end"
        )
        if PHASES >= 50:
            assert half[-1] - half[0] < FLAT
