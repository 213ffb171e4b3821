"""Element rules are checked when they are written down."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from megatron_ext._ops import Segment
from megatron_ext._ops.segments import COEFFICIENTS, COLUMNS, Code, encode
from megatron_ext.errors import PolicyError
from megatron_ext.layout import GlobalIndex
from megatron_ext.rules import BatchSize, Fill, Floor, Keep, PruneMagnitude, PruneRandom, Scale
from tests.support.moments import stream_key


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Scale(math.inf), "Scale.factor is inf; it must be a finite number"),
        (lambda: Fill(math.nan), "Fill.value is nan"),
        (lambda: Floor(math.inf), "Floor.minimum is inf"),
        (lambda: Floor(0.0, math.nan), "Floor.factor is nan"),
        (lambda: PruneMagnitude(-1.0), "PruneMagnitude.threshold is -1.0; it must be at least 0"),
        (lambda: PruneRandom(1.5), "PruneRandom.probability is 1.5; it must be between 0 and 1"),
        (lambda: BatchSize(0.0, (0.9, 0.95), 1), "BatchSize.ratio is 0.0"),
        (lambda: BatchSize(2.0, (0.0, 0.95), 1), "BatchSize.betas is"),
        (lambda: BatchSize(2.0, (0.9, 1.0), 1), "BatchSize.betas is"),
        (lambda: BatchSize(2.0, (0.9, 0.95), 0), "BatchSize.step is 0; it must be at least 1"),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(PolicyError) as caught:
        make()
    assert message in str(caught.value)


def test_the_table_by_hand() -> None:
    batch_size = BatchSize(4.0, (0.9, 0.95), 2)
    where = GlobalIndex(1, 2, 3, 4)
    integers, values = encode(
        [
            Segment(3, 5, 8, Floor(0.25, 2.0), PruneRandom(0.5, 7), where, 99),
            Segment(0, 0, 1, Keep(), batch_size),
        ]
    )
    key = stream_key(7, 99)
    assert integers.shape == (2, len(COLUMNS))
    assert values.shape == (2, 2 * COEFFICIENTS)
    floor, random = Code.FLOOR, Code.PRUNE_RANDOM
    signed = key - (1 << 64) if key >= 1 << 63 else key
    assert integers[0].tolist() == [3, 5, 8, floor, random, 1, 2, 3, 4, 0, signed]
    assert values[0].tolist() == [2.0, 0.25, 0, 0, 0, 0, 0.5, 0, 0, 0, 0, 0]
    assert integers[1, 3:5].tolist() == [Code.KEEP, Code.BATCH_SIZE]
    c = 0.1 / 1.9
    corrections = [1 / (1 - 0.81), 1 / (1 - 0.9025)]
    expected = [*corrections, c, 1 / (1 - c), 0.25, 1 - 0.9025]
    assert values[1, COEFFICIENTS:].tolist() == pytest.approx(expected, rel=1e-12)


def test_no_segments_are_empty_tables() -> None:
    integers, values = encode([])
    assert (integers.shape, values.shape) == ((0, 11), (0, 12))


@pytest.mark.parametrize(
    ("exp_avg", "message"),
    [
        (BatchSize(2.0, (0.9, 0.95), 5), "is a rule for exp_avg_sq"),
        (Scale(2.0), "reads exp_avg, which must be kept"),
    ],
)
def test_the_batch_size_rule_is_for_exp_avg_sq_beside_a_kept_exp_avg(
    exp_avg: Scale, message: str
) -> None:
    with pytest.raises(PolicyError, match=message):
        encode([Segment(0, 0, 1, exp_avg, BatchSize(2.0, (0.9, 0.95), 5))])
