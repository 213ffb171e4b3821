"""What the verification of a checkpoint finds."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import torch

from ..base.schema import Count
from .master_proof import MasterProof
from .moment_scan import unusable


@dataclass(frozen=True)
class Damage:
    """A file, or an item of one, that cannot be used.

    Args:
        file: Path of the file below the directory of the iteration.
        item: Key of the item; empty for the file itself.
        problem: What was found.
    """

    file: str
    item: str
    problem: str


@dataclass(frozen=True)
class UnusableValues:
    """A tensor with elements that training cannot use.

    Args:
        name: Its key; in a legacy file or an object the path of the tensor in it.
        elements: Number of NaN and infinite elements, and of negative ones of exp_avg_sq.
        of: Number of elements that were read.
    """

    name: str
    elements: Count
    of: Count


@dataclass(frozen=True)
class Verification:
    """What reading a whole checkpoint has found.

    Args:
        directory: Directory of the iteration.
        files: Number of files that were read.
        items: Number of items in them whose CRC32 was compared. A legacy file is one item.
        size: Bytes of these items.
        damages: What cannot be used.
        values: Tensors with unusable elements, by name.
        master_weights: Whether the master weights are the model's weights.
        notes: What was not checked.
    """

    directory: str
    files: Count
    items: Count
    size: Count
    damages: tuple[Damage, ...]
    values: tuple[UnusableValues, ...]
    master_weights: MasterProof
    notes: tuple[str, ...]

    @property
    def status(self) -> int:
        """The exit status: 2 with a damage, 1 with unusable values or other masters, else 0."""
        if self.damages:
            return 2
        return int(bool(self.values or self.master_weights.differences))


@dataclass
class Findings:
    """What has been found so far."""

    items: int = 0
    size: int = 0
    files: set[str] = field(default_factory=set)
    damages: list[Damage] = field(default_factory=list)
    #: Name of a tensor -> its unusable elements, and all.
    elements: dict[str, list[int]] = field(default_factory=lambda: defaultdict(lambda: [0, 0]))

    def count(self, name: str, state: str, part: torch.Tensor) -> None:
        """Count the elements of a part of a tensor.

        Args:
            name: The tensor.
            state: The optimizer's state that it is; any text for another tensor.
            part: Some of its elements.
        """
        if part.numel() and part.is_floating_point():
            counts = self.elements[name]
            counts[0] += unusable(part, state)
            counts[1] += part.numel()

    def add_item(self, file: str, size: int) -> None:
        """Count an item that was read."""
        self.files.add(file)
        self.items += 1
        self.size += size

    def result(self, directory: str, masters: MasterProof, notes: tuple[str, ...]) -> Verification:
        """Return everything that was found.

        Args:
            directory: Directory of the iteration.
            masters: The comparison of the master weights.
            notes: What was not checked.
        """
        bad = [UnusableValues(name, n, of) for name, (n, of) in self.elements.items() if n]
        return Verification(
            directory=directory,
            files=len(self.files),
            items=self.items,
            size=self.size,
            damages=tuple(dict.fromkeys(self.damages)),
            values=tuple(sorted(bad, key=lambda v: v.name)),
            master_weights=masters,
            notes=notes,
        )
