"""A small run of every rule on the GPU, for compute-sanitizer: odd lengths, addresses and types."""

import torch

from megatron_ext._ops import Transform, magnitude_thresholds, weight_differences
from megatron_ext._ops.segments import Segment, Statistics
from tests.support.moments import DTYPES, rule_pairs


def main() -> None:
    for m_type in DTYPES:
        for v_type in DTYPES:
            for offset in (0, 3):
                n = 40_003
                m = torch.ones(n + offset, dtype=m_type, device="cuda")[offset:]
                v = torch.ones(n + offset, dtype=v_type, device="cuda")[offset:]
                for rules in rule_pairs().values():
                    segments = [Segment(0, 1, 70, *rules), Segment(0, 70, n - 1, *rules)]
                    for statistics in Statistics:
                        Transform.of([m], [v], segments)(statistics)
                prepared = Transform.keep([m], [v]).prepare()
                prepared(Statistics.AFTER)
                prepared(Statistics.BEFORE_AND_AFTER)
                weight_differences([m], [v])
    ranges = torch.tensor([[0, 1, n, 0]])
    magnitude_thresholds([m], ranges, torch.tensor([0.5], dtype=torch.float64))
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
