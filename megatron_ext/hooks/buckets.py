"""Find the positions of parameters in the buckets of Megatron's distributed optimizers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from ..base import ranks
from ..checkpoint.bucket_layout import Bucket, BucketLayout, Placed
from ..errors import HostError, MegatronExtError
from ..host.contract import megatron_version
from ..resume.parameters import locate_parameters


def bucket_layout(members: Sequence[Any]) -> BucketLayout | None:
    """Gather the buckets of all ranks; collective over the default process group.

    Args:
        members: The optimizers of the chain, in its order.

    Returns:
        The buckets, the same on every rank; None if no optimizer is distributed.

    Raises:
        MegatronExtError: A model's sharded_state_dict does not place a parameter; on every rank.
    """
    mine: list[Bucket] = []
    error: MegatronExtError | None = None
    try:
        for number, member in enumerate(members):
            # core/optimizer/optimizer.py:1541, 0.19.2
            prefix = f"chained_{number}." if len(members) > 1 else ""
            mine += _buckets(member, prefix)
    except MegatronExtError as e:
        error = e
    ranks.stop_together("the layout of the buckets", error)
    found = {bucket.key: bucket for of_rank in ranks.gather(mine) for bucket in of_rank}
    if not found:
        return None
    return BucketLayout(megatron_version(), tuple(found[key] for key in sorted(found)))


def _buckets(optimizer: Any, prefix: str) -> Iterator[Bucket]:
    """Yield an optimizer's buckets on data-parallel rank 0, and nothing on the other ranks.

    The keys are those of sharded_param_state_dp_reshardable (core/optimizer/distrib_optimizer.py:
    1828, 0.19.2).
    """
    ranges = getattr(optimizer, "gbuf_ranges", None)
    if not ranges or optimizer.data_parallel_group.rank() != 0:
        return
    where = locate_parameters(optimizer.resume_chunks)
    for number, (buffer, of_buffer) in enumerate(zip(optimizer.buffers, ranges, strict=True)):
        (dtype,) = of_buffer
        placed: dict[int, list[Placed]] = defaultdict(list)
        for param, (begin, end, bucket) in buffer.param_index_map.items():
            if id(param) not in where:
                raise HostError(
                    f"the model's sharded_state_dict has no entry for a parameter of shape "
                    f"{tuple(param.shape)}, so that its global name is not known. Give its module "
                    "a sharded_state_dict"
                )
            name, shape, blocks = where[id(param)]
            offset = buffer.buckets[bucket].offset
            at = int(begin - offset)
            placed[bucket].append(Placed(name, shape, at, at + int(end - begin), blocks))
        for bucket, made in enumerate(buffer.buckets):
            key = (
                f"{prefix}optimizer.distributed.dp_group_idx_{optimizer.data_parallel_group_idx}"
                f".gbuf_idx_{number}.dtype_{dtype}.bucket_idx_{bucket}"
            )
            inside = sorted(placed[bucket], key=lambda p: p.begin)
            yield Bucket(key, int(made.numel_unpadded), tuple(inside))
