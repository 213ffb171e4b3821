"""Positions of the parameters in the buckets of a dp_reshardable checkpoint. Pure.

Such a checkpoint names buckets, not parameters. A dry run with the arguments of the run that wrote
it knows the positions and writes them to a file (``--selective-dry-run --selective-report DIR``,
`hooks.buckets`). The file follows ``megatron_ext/schemas/parameter-layout.schema.json``.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..base.files import replace
from ..base.placement import Block
from ..base.schema import Count, Versioned
from ..base.values import fields_as_json
from ..errors import CheckpointError

SCHEMA = "megatron_ext/parameter-layout/1"
FILE_NAME = "parameter-layout.json"

#: How many differences an error names.
_MOST = 4


@dataclass(frozen=True)
class Placed:
    """The part of one parameter that a bucket holds: the shard of a tensor-parallel rank.

    Args:
        name: Global name: layers and experts are numbered in the whole model.
        shape: Shape of the unsharded parameter.
        begin: First element in the bucket.
        end: One past the last element.
        blocks: Positions of these elements in the unsharded parameter, in the bucket's order.
    """

    name: str
    shape: tuple[Count, ...]
    begin: Count
    end: Count
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Bucket:
    """A bucket, the same whatever the number of data-parallel ranks.

    Args:
        key: Its key in a checkpoint, without the final ``.exp_avg`` and so on.
        elements: Number of elements, with the padding between parameters but without the padding
            after the last one.
        parameters: Its parameters, in the bucket's order.
    """

    key: str
    elements: Count
    parameters: tuple[Placed, ...]


class LayoutDocument(Versioned):
    """Which parameter lies where in the buckets that a dp_reshardable checkpoint stores.

    It is parameter-layout.json, written by rank 0 with --selective-dry-run --selective-report DIR.
    The keys and the places hold for every number of data-parallel ranks, and for one tensor,
    pipeline and expert parallel layout.

    Attributes:
        megatron_core: Version of megatron-core that made the buckets.
        buckets: Of all model-parallel ranks and all optimizers of the chain, in the order of their
            keys.
    """

    megatron_core: str
    buckets: list[Bucket]


@dataclass(frozen=True)
class BucketLayout:
    """The buckets of all model-parallel ranks and all optimizers of a chain.

    Args:
        megatron: Version of megatron-core that made them.
        buckets: The buckets, in the order of their keys.
    """

    megatron: str
    buckets: tuple[Bucket, ...]

    def write(self, directory: Path) -> Path:
        """Write the JSON file atomically and return its path.

        Args:
            directory: It is created if it is missing.
        """
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / FILE_NAME
        buckets = [fields_as_json(bucket) for bucket in self.buckets]
        document: LayoutDocument = {
            "schema": SCHEMA,
            "megatron_core": self.megatron,
            "buckets": buckets,
        }
        replace(path, json.dumps(document, indent=1))
        return path

    @classmethod
    def read(cls, path: str | Path) -> BucketLayout:
        """Read a file that `write` wrote.

        Args:
            path: The JSON file.

        Raises:
            CheckpointError: The file is missing, has another format, or contradicts itself.
        """
        try:
            document = json.loads(Path(path).read_bytes())
            if document["schema"] != SCHEMA:
                raise ValueError(f"schema {document['schema']!r}, expected {SCHEMA!r}")
            layout = cls(str(document["megatron_core"]), tuple(map(_bucket, document["buckets"])))
            _require_consistent(layout.buckets)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as e:
            raise CheckpointError(
                f"--layout {path}: expected the {FILE_NAME} that --selective-dry-run with "
                f"--selective-report writes, found one that cannot be read: {type(e).__name__}: {e}"
            ) from e
        return layout

    def misfits(self, elements: Mapping[str, int]) -> str:
        """Describe how the layout differs from a checkpoint; empty if it fits.

        Args:
            elements: Key of each bucket in the checkpoint -> its number of elements.
        """
        mine = {bucket.key: bucket.elements for bucket in self.buckets}
        lines = [f"{key} is in the checkpoint only" for key in elements if key not in mine]
        lines += [f"{key} is in the layout only" for key in mine if key not in elements]
        lines += [
            f"{key} has {elements[key]} elements in the checkpoint, {mine[key]} in the layout"
            for key in elements
            if mine.get(key, elements[key]) != elements[key]
        ]
        more = [f"and {len(lines) - _MOST} more"] if len(lines) > _MOST else []
        return "; ".join([*lines[:_MOST], *more])

    def unsharded(self) -> Iterator[tuple[str, list[tuple[str, int, int]]]]:
        """Yield the name and the parts of every parameter; a part is (bucket key, begin, end).

        If tensor-parallel ranks hold equal copies, as of a norm's weight, only the first is given.
        Parameters of the same name in two optimizers of a chain are given separately.
        """
        parts: dict[tuple[str, str], dict[tuple[Block, ...], tuple[str, int, int]]]
        parts = defaultdict(dict)
        for bucket in self.buckets:
            for p in bucket.parameters:
                of_parameter = parts[_chain(bucket.key), p.name]
                of_parameter.setdefault(p.blocks, (bucket.key, p.begin, p.end))
        for (_, name), by_blocks in parts.items():
            yield name, list(by_blocks.values())


def _chain(key: str) -> str:
    """Return the part of a key that names the optimizer of a chain, such as ``chained_0.``."""
    return key.partition("optimizer.distributed.")[0]


def _bucket(value: Mapping[str, Any]) -> Bucket:
    placed = (
        Placed(
            str(p["name"]),
            tuple(map(_count, p["shape"])),
            _count(p["begin"]),
            _count(p["end"]),
            tuple(Block(**{k: _count(n) for k, n in block.items()}) for block in p["blocks"]),
        )
        for p in value["parameters"]
    )
    return Bucket(str(value["key"]), _count(value["elements"]), tuple(placed))


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} where a number of elements was expected")
    return value


def _require_consistent(buckets: Iterable[Bucket]) -> None:
    """Check that parameters lie inside their bucket, do not overlap, and are complete.

    Raises:
        ValueError: One of the three does not hold.
    """
    known: dict[tuple[str, str], tuple[tuple[int, ...], dict[tuple[Block, ...], int]]] = {}
    keys = set()
    for bucket in buckets:
        if bucket.key in keys:
            raise ValueError(f"{bucket.key} is there twice")
        keys.add(bucket.key)
        at = 0
        for p in bucket.parameters:
            length = sum(block.length for block in p.blocks)
            if not at <= p.begin < p.end <= bucket.elements or length != p.end - p.begin:
                raise ValueError(
                    f"{p.name} at {p.begin} to {p.end} with {length} elements does not fit into "
                    f"{bucket.key} of {bucket.elements} from {at} on"
                )
            at = p.end
            shape, parts = known.setdefault((_chain(bucket.key), p.name), (p.shape, {}))
            if shape != p.shape:
                raise ValueError(f"{p.name} has the shapes {shape} and {p.shape}")
            parts[p.blocks] = length
    for (_, name), (shape, parts) in known.items():
        if sum(parts.values()) != math.prod(shape):
            raise ValueError(
                f"{name} of shape {shape} has {sum(parts.values())} of {math.prod(shape)} elements"
            )
