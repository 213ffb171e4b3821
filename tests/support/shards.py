"""Shards of a tensor-parallel rank, as boxes of the parameter."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_ext.base.placement import Block, block_of


def tensor_parallel(
    shape: Sequence[int], dim: int, ranks: int, rank: int, halves: int = 1
) -> tuple[Block, ...]:
    """The blocks of one rank's shard, as Megatron's sharded state dict describes them.

    Args:
        shape: Of the unsharded parameter.
        dim: Partitioned dimension.
        ranks: Tensor-parallel ranks.
        rank: One of them.
        halves: Matrices that are stored one after the other along dimension 0 and are each cut by
            themselves: 2 for a gated fc1 (gate and up projection).
    """
    matrix = [shape[0] // halves, *shape[1:]]
    local = [n // ranks if d == dim else n for d, n in enumerate(matrix)]
    offset = [rank * n if d == dim else 0 for d, n in enumerate(local)]
    return tuple(block_of(matrix, offset, local, half * matrix[0]) for half in range(halves))
