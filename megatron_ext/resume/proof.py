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

from ..base import ranks
from ..base.text import first_of
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
    """

    proven: int = 0
    differences: dict[int, Difference] = field(default_factory=dict)

    @property
    def differing(self) -> int:
        """The number of elements that differ on this rank."""
        return sum(d.elements for d in self.differences.values())

    @torch.no_grad()
    def compare(self, model_param: torch.Tensor, master: Any, begin: int, end: int) -> None:
        """Compare the loaded master weights of one shard with the model's weights.

        Nothing is compared if the model's weights are quantized (a subclass of Tensor, such as TE's
        fp8 tensors) or if the master weights are not stored as floating-point values (TE's 16-bit
        remainders, which only make an fp32 value together with the model's weight).

        Args:
            model_param: The model's parameter, after its load.
            master: The master weights of the shard, ``[end - begin]``, before they are written.
            begin: First element of the shard in the flattened parameter.
            end: One past the last element.
        """
        weight = model_param.data
        if type(weight) is not torch.Tensor or not _is_float(weight) or not _is_float(master):
            return
        weight, master = weight.view(-1)[begin:end], master.detach().reshape(-1)
        found = _difference(master, weight, weight.dtype)
        # The run that saved the weights may have had another dtype.
        others = (dtype for dtype in _STORED if dtype != weight.dtype)
        if found.elements and all(_difference(master, weight, d).elements for d in others):
            self.differences[id(model_param)] = found
        else:
            self.proven += found.of


def compare_all(proof: Proof, optimizer: Any) -> None:
    """Compare the master weights of an optimizer that is not distributed, after its load.

    Args:
        proof: Receives the result.
        optimizer: A Float16OptimizerWithFloat16Params. An FP32Optimizer has no master weights.
    """
    for held in _with_masters(optimizer):
        proof.compare(held.model_param, held.key, held.begin, held.end)


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
            "If the moments belong to this model and only its weights were edited, pass "
            "--selective-master-weights model: the master weights are made from the model's "
            "weights. Otherwise load another checkpoint, or pass --no-load-optim to start with a "
            "new optimizer (the Adam moments are then lost)"
        )
    ranks.stop_together("comparing the master weights with the model's weights", error)


def _with_masters(optimizer: Any) -> list[Held]:
    return [held for held in held_parameters(optimizer) if held.key is not held.model_param]


def _is_float(tensor: Any) -> bool:
    return isinstance(tensor, torch.Tensor) and tensor.dtype in _STORED


def _difference(master: torch.Tensor, weight: torch.Tensor, stored: torch.dtype) -> Difference:
    """Count the elements that do not round to the weights, in parts of bounded size."""
    elements, largest = 0, 0.0
    for at in range(0, weight.numel(), _ELEMENTS_AT_A_TIME):
        mine = weight[at : at + _ELEMENTS_AT_A_TIME]
        part = master[at : at + _ELEMENTS_AT_A_TIME].to(mine.device)
        rounded = part.to(stored).to(mine.dtype)
        # torch.equal is one pass, and the result that is expected; NaN equals nothing there.
        if torch.equal(rounded, mine):
            continue
        differs = (rounded != mine) & ~(rounded.isnan() & mine.isnan())
        elements += int(differs.sum())
        distance = (rounded[differs].float() - mine[differs].float()).abs().nan_to_num(0.0)
        largest = max(largest, float(distance.max())) if distance.numel() else largest
    return Difference(elements, weight.numel(), largest)
