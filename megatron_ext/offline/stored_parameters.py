"""List the unsharded parameters of a checkpoint by their global names. Pure.

Only the index is read. A checkpoint key is not a parameter's name: homogeneous layers, and the
experts of a layer, are axes of one tensor, and the keys are those of TransformerEngine's fused
modules. The names are the same as those from `megatron_ext.resume.parameters` in a run.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..checkpoint import names
from ..checkpoint.state_keys import parse_state_key
from ..checkpoint.stored import StoredCheckpoint
from ..host.optimizers import ADAM, FIRST, STORED, state_of_groups
from ..host.param_groups import VOCABULARY
from ..plan.parameters import Parameter

#: The two halves of a gated fc1, which are stored separately (core/transformer/mlp.py:465).
_HALVES = ("_w", "_v")
#: Tensors of a model that no optimizer updates.
_BUFFERS = re.compile(r".*(?:\.expert_bias|\.local_tokens_per_expert|\.inv_freq|_extra_state\d*)")
#: Part of the key of a tensor that is stored by parameter.
_BY_NAME = "optimizer.state."
_IN_BUCKETS = "optimizer.distributed."
_OF_OPTIMIZER = re.compile(r"(?:chained_\d+\.)?optimizer\.")


@dataclass(frozen=True)
class Named:
    """A parameter's name and unsharded shape.

    Args:
        name: Its global name.
        shape: Its unsharded shape.
        moments: The tensors of its moments, if they are stored by parameter.
    """

    name: str
    shape: tuple[int, ...]
    moments: frozenset[str] = frozenset()

    @property
    def expert(self) -> bool:
        """Whether it belongs to one expert."""
        return ".mlp.experts." in self.name


@dataclass(frozen=True)
class Stored:
    """The parameters of a checkpoint.

    Args:
        parameters: The parameters, in the order of the index.
        by: Source of the names: ``optimizer`` for the keys of the moments; ``model`` for the keys
            of the weights, if the moments are stored by buckets; None without an index.
    """

    parameters: tuple[Named, ...]
    by: Literal["optimizer", "model"] | None


def parameters_of(stored: StoredCheckpoint) -> Stored:
    """Name the parameters of a checkpoint.

    Args:
        stored: The checkpoint. Its index is read, but no tensor.
    """
    if stored.store is None:
        return Stored((), None)
    entries = stored.store.index.state_dict_metadata
    of_moments: dict[str, tuple[int, ...]] = {}
    moments: dict[str, set[str]] = {}
    for key in entries:
        found = parse_state_key(key) if _BY_NAME in key else None
        if found is not None and not found.bucket and found.state in STORED:
            moments.setdefault(found.name, set()).add(found.state)
            if found.state in FIRST:
                of_moments[found.name] = tuple(entries[key].size)
    in_buckets = any(_IN_BUCKETS in key for key in entries)
    if of_moments and not in_buckets:
        return Stored(tuple(_named(of_moments, stored.args, moments)), "optimizer")
    of_model = {
        key: shape
        for key, shape in stored.tensors.items()
        if shape is not None
        and not _OF_OPTIMIZER.match(key)
        and not _BUFFERS.fullmatch(key)
        and "/" not in key
    }
    return Stored(tuple(_named(of_model, stored.args, moments)), "model")


def in_groups(
    parameters: Sequence[Named],
    optimizers: Sequence[Sequence[Mapping[str, Any]]],
    rows: tuple[int, int] | None = None,
    decoupled: bool = False,
    known: Mapping[str, tuple[int, int]] | None = None,
) -> list[list[Parameter]]:
    """Assign each parameter to a param_group.

    If the groups are assumed, so are the places, as Megatron builds groups by default: with expert
    parallelism experts have separate groups, and parameters of one dimension have no weight decay
    (core/optimizer/__init__.py:122 and :320, 0.19.2). If several groups fit, the first one is used.

    Args:
        parameters: All parameters.
        optimizers: For each optimizer of the chain its param_groups.
        rows: Rows of the embedding in the checkpoint and now, if these differ.
        decoupled: Whether embedding and output layer have a separate learning rate.
        known: Name -> positions of its optimizer and its group; None if they are assumed.

    Returns:
        For each optimizer its parameters.
    """
    parallel = any(g.get("is_expert_parallel") for groups in optimizers for g in groups)
    groups = [(n, i, g) for n, of_one in enumerate(optimizers) for i, g in enumerate(of_one)]
    places: dict[tuple[bool, bool, bool, frozenset[str]], tuple[int, int]] = {}
    out: list[list[Parameter]] = [[] for _ in optimizers]
    for one in parameters:
        plain = len(one.shape) == 1 or one.name.endswith(".bias")
        vocabulary = one.name in VOCABULARY
        kind = one.expert and parallel, plain, vocabulary and decoupled, one.moments
        if kind not in places:
            places[kind] = _place(groups, *kind)
        number, index = places[kind] if known is None else known[one.name]
        shape, saved_rows = one.shape, None
        if vocabulary and rows is not None and shape and shape[0] == rows[0]:
            shape, saved_rows = (rows[1], *shape[1:]), rows[0]
        out[number].append(Parameter(one.name, shape, index, saved_rows))
    return out


def _place(
    groups: Sequence[tuple[int, int, Mapping[str, Any]]],
    expert: bool,
    plain: bool,
    decoupled: bool,
    moments: frozenset[str],
) -> tuple[int, int]:
    fits = [(n, i, g) for n, i, g in groups if bool(g.get("is_expert_parallel")) == expert]
    tests = (
        lambda g: not moments or moments == set((state_of_groups([g]) or ADAM).tensors),
        lambda g: (g.get("wd_mult", 1.0) == 0.0) == plain,
        lambda g: (
            (g.get("default_config", True) is False or g.get("is_decoupled_lr", False)) == decoupled
        ),
    )
    for test in tests:
        fits = [one for one in fits if test(one[2])] or fits
    number, index, _ = (fits or groups)[0]
    return number, index


def _named(
    shapes: Mapping[str, tuple[int, ...]],
    args: Mapping[str, Any],
    moments: Mapping[str, Collection[str]],
) -> Iterator[Named]:
    """Yield the parameters of checkpoint keys that have lost the optimizer's prefix."""
    style = names.Style.of_arguments(args)
    for key, shape in shapes.items():
        held = frozenset(moments.get(key, ()))
        if key.endswith(_HALVES[1]) and key[:-2] + _HALVES[0] in shapes:
            continue
        if key.endswith(_HALVES[0]) and (other := key[:-2] + _HALVES[1]) in shapes:
            # The halves of layers that are an axis have one more axis before their rows.
            axis = names.leading_axes(key)
            rows = shape[axis] + shapes[other][axis]
            key, shape = key[:-2], (*shape[:axis], rows, *shape[axis + 1 :])
        for place in names.unstacked(key, shape):
            yield Named(names.name_of(key, place.lead, style), place.shape, held)
