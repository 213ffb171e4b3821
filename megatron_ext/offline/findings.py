"""Collect errors, warnings and notes: every part is tried, whatever is wrong with another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from ..errors import MegatronExtError

T = TypeVar("T")


@dataclass
class Findings:
    """What has been found so far.

    Args:
        errors: Everything for which the resume would be refused.
        warnings: What a user should look at.
        notes: What was assumed or cannot be told offline.
    """

    errors: list[MegatronExtError] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def refuse(self, error: MegatronExtError) -> None:
        """Add an error that is not there yet."""
        if str(error) not in map(str, self.errors):
            self.errors.append(error)

    def tried(self, call: Callable[[], T], notes: list[str] | None = None) -> T | None:
        """What it gives; an error refuses the resume, or is a note."""
        try:
            return call()
        except MegatronExtError as e:
            if notes is None:
                self.refuse(e)
            else:
                notes.append(str(e))
            return None

    def accepted(self, call: Callable[[], T]) -> T | None:
        """What Megatron's scheduler gives; its refusal of what is refused already is a note."""
        return self.tried(call, self.notes if self.errors else None)
