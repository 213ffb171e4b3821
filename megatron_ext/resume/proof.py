"""Prove that the loaded master weights belong to the weights that the model has loaded.

A training step rounds the fp32 master weights to the model's dtype and writes them into the model.
Megatron saves both, and loads the model before the optimizer (training/checkpointing.py:2541 and
2573, 0.19.2). The master weights of the same parameter of the same save therefore round to the
loaded weights, bit for bit. Those of another parameter do not, nor do weights that were edited
after the save.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .. import _ops
from ..base import ranks
from ..base.text import first_of
from ..checkpoint import fp16_masters
from ..errors import CheckpointError
from .parameters import Held, held_parameters, names_of

#: What a difference means, and what to do, if the state is stored by position.
_BY_POSITION = (
    "This format stores the state by position: it is that of other parameters if others were "
    "frozen then, or the model was another one. Else the weights were edited after the save, or a "
    "file is damaged. `python -m megatron_ext convert SOURCE TARGET --to fully_reshardable` copies "
    "a dp_reshardable checkpoint with names (for legacy torch: one more save of the old model with "
    "--dist-ckpt-optim-fully-reshardable); a resume from that one names what is new, and "
    "--selective-new-parameters takes it."
)
#: The same if the state has the parameters' names.
_BY_NAME = (
    "The weights were edited after the save, a file is damaged, or stock Megatron 0.16 to 0.19 has "
    "written the state: it stores shifted tensors as fully_reshardable if several buckets are "
    "padded. `python -m megatron_ext convert SOURCE TARGET --to fully_reshardable` writes a copy "
    "in which shifted state is put back, or says that it is something else (`python -m "
    "megatron_ext inspect CHECKPOINT --moments` lists what differs)."
)
_ELEMENTS_AT_A_TIME = 1 << 22
#: The dtypes in which Megatron stores a model's weights.
_STORED = (torch.bfloat16, torch.float16, torch.float32)
#: Id of a model parameter, the master weights of its shard and its weights.
_Pair = tuple[int, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Difference:
    """A parameter shard whose loaded master weights are not the model's weights.

    Args:
        elements: Number of elements that differ.
        of: Number of elements of the shard.
        largest: Largest absolute difference, ignoring NaN.
    """

    elements: int
    of: int
    largest: float

    def __str__(self) -> str:
        """Return a phrase for messages."""
        return f"{self.elements} of {self.of} (by up to {self.largest:.3g})"


@dataclass
class Proof:
    """The comparison of this rank's master weights with the model's weights.

    Args:
        proven: Number of elements that round to the model's weights.
        differences: Id of a model parameter -> how its shard differs.
        done: Ids of the model parameters that need no comparison any more.
        masters: Number of elements that are master weights for certain.
        remainders: Id of a model parameter -> how its shard would differ if the whole numbers that
            were taken for remainders were master weights.
    """

    proven: int = 0
    differences: dict[int, Difference] = field(default_factory=dict)
    done: set[int] = field(default_factory=set)
    masters: int = 0
    remainders: dict[int, Difference] = field(default_factory=dict)

    @property
    def differing(self) -> int:
        """The number of elements that differ on this rank."""
        return sum(d.elements for d in self.differences.values())

    def refuse_remainders(self) -> None:
        """Count what was taken for remainders as master weights that differ."""
        self.differences.update(self.remainders)

    def compare(self, model_param: torch.Tensor, master: Any, begin: int, end: int) -> None:
        """Compare the master weights of one shard with the model's weights.

        Nothing is compared if the model's weights are quantized (a subclass of Tensor, such as TE's
        fp8 tensors) or if the master weights are not stored as floating-point values (TE's 16-bit
        remainders, which only make an fp32 value together with the model's weight).

        Args:
            model_param: The model's parameter, after its load.
            master: The master weights of the shard, ``[end - begin]``.
            begin: First element of the shard in the flattened parameter.
            end: One past the last element.
        """
        self.done.add(id(model_param))
        pair = _comparable(model_param, master, begin, end)
        if pair is not None:
            self._compare([(id(model_param), *pair)])

    def compare_all(self, optimizer: Any) -> None:
        """Compare what is left, after the load, with one call of the op for each device.

        The bytes read are those of the master weights and of the weights, once. What the load has
        written is compared: an fp32 parameter is its own master weight, and is compared before.
        fp16 master weights may be one rounding away (`megatron_ext.checkpoint.fp16_masters`).

        Args:
            optimizer: A DistributedOptimizer or Float16OptimizerWithFloat16Params. An FP32Optimizer
                has no master weights.
        """
        by_device: dict[torch.device, list[_Pair]] = {}
        twice_rounded: list[tuple[Held, torch.Tensor]] = []
        for held in held_parameters(optimizer):
            state = optimizer.optimizer.state.get(held.key, {})
            # The key is the model's own weight if the master weight is in the state
            # (core/optimizer/distrib_optimizer.py:1109, 0.19.2).
            master = state.get("master_param", held.key)
            pair = _comparable(held.model_param, master, held.begin, held.end)
            if pair is None or id(held.model_param) in self.done:
                continue
            if master.dtype == torch.float16 and master is not held.key:
                twice_rounded.append((held, pair[1]))
                continue
            found = (id(held.model_param), *pair)
            if pair[0].device != pair[1].device:
                self._compare([found])  # a copy of one weight at a time (--optimizer-cpu-offload)
            elif pair[0].data_ptr() != pair[1].data_ptr():
                by_device.setdefault(pair[0].device, []).append(found)
        for pairs in by_device.values():
            self._compare(pairs)
        self._compare_twice_rounded(optimizer.optimizer, twice_rounded)

    @torch.no_grad()
    def _compare_twice_rounded(
        self, inner: Any, pairs: Sequence[tuple[Held, torch.Tensor]]
    ) -> None:
        """Compare fp16 master weights, of which one has a copy at a time, with one read back."""
        counts = [_beyond(inner.get_unscaled_state(h.key, "master_param"), w) for h, w in pairs]
        found = torch.stack(counts).tolist() if counts else []
        for (held, weight), (elements, largest) in zip(pairs, found, strict=True):
            if elements:
                here = Difference(int(elements), weight.numel(), largest)
                self.differences[id(held.model_param)] = here
            else:
                self.proven += weight.numel()

    @torch.no_grad()
    def _compare(self, pairs: Sequence[_Pair]) -> None:
        """Compare pairs whose master weights are on one device."""
        _, masters, weights = (list(x) for x in zip(*pairs, strict=True))
        here = [w.to(m.device) for m, w in zip(masters, weights, strict=True)]
        counts = _ops.weight_differences(masters, here)
        for (number, master, weight), (elements, largest) in zip(pairs, counts, strict=True):
            if elements and not any(_rounds_to(master, weight, d) for d in _STORED):
                self.differences[number] = Difference(elements, weight.numel(), largest)
            else:
                self.proven += weight.numel()


@torch.no_grad()
def masters_from_model(optimizer: Any, only: frozenset[int] | None = None) -> None:
    """Make the master weights of an optimizer that is not distributed from the model's weights.

    Args:
        optimizer: A Float16OptimizerWithFloat16Params.
        only: Ids of the model parameters; None for all.
    """
    for held in _with_masters(optimizer):
        if only is None or id(held.model_param) in only:
            held.key.copy_(held.model_param)


def refuse_differences(proof: Proof, optimizer: Any, model_chunks: Sequence[Any]) -> None:
    """Raise on every rank; collective, called if some rank has differences.

    Args:
        proof: The comparison on this rank.
        optimizer: The Megatron optimizer.
        model_chunks: Its model, for the names of its parameters.

    Raises:
        CheckpointError: On every rank with differences.
        AgreementError: On the other ranks, with the messages.
    """
    error = None
    if proof.differences:
        names = names_of(optimizer, model_chunks)
        found = [
            f"{names.get(id(held.key), 'unnamed')}: {d}"
            for held in held_parameters(optimizer)
            if (d := proof.differences.get(id(held.model_param))) is not None
        ]
        load = optimizer.resume.load
        by_position = load is None or load.mapped is None
        error = CheckpointError(
            "the checkpoint's master weights are not the weights that the model has loaded. "
            f"Elements that differ: {first_of(found)}. {_BY_POSITION if by_position else _BY_NAME} "
            "If the moments belong to this model and only its weights were edited, or the run "
            "before had --main-params-dtype fp16 and rounded its weights twice, pass "
            "--selective-master-weights model: the master weights are made from the model's "
            "weights. Otherwise load another checkpoint, or pass --no-load-optim to start with a "
            "new optimizer (the Adam moments are then lost)"
        )
    ranks.stop_together("comparing the master weights with the model's weights", error)


def _with_masters(optimizer: Any) -> list[Held]:
    return [held for held in held_parameters(optimizer) if held.key is not held.model_param]


def _comparable(
    model_param: torch.Tensor, master: Any, begin: int, end: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    weight = model_param.data
    if type(weight) is not torch.Tensor or not (_is_float(weight) and _is_float(master)):
        return None
    return master.detach().reshape(-1), weight.view(-1)[begin:end]


def _beyond(master: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Count the elements that were not rounded from the same number, and their largest distance."""
    if not weight.numel():
        return torch.zeros(2, dtype=torch.float64, device=weight.device)
    flat = master.view(-1)
    apart = (flat - weight.float()).abs()
    # NaN in one of them is a difference; in both it is none.
    equal = (apart <= fp16_masters.distance(flat, weight)) | (flat.isnan() & weight.isnan())
    largest = torch.where(equal, 0.0, apart.nan_to_num(0.0)).max()
    return torch.stack([(~equal).sum().double(), largest.double()])


def _is_float(tensor: Any) -> bool:
    return isinstance(tensor, torch.Tensor) and tensor.dtype in _STORED


def _rounds_to(master: torch.Tensor, weight: torch.Tensor, stored: torch.dtype) -> bool:
    """Whether the weights are the master weights, if the run that saved them had another dtype."""
    parts = zip(*(x.split(_ELEMENTS_AT_A_TIME) for x in (master, weight)), strict=True)
    return stored != weight.dtype and not any(
        _ops.weight_differences([m.to(stored)], [w.to(m.device)])[0][0] for m, w in parts
    )
