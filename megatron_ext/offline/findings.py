"""Collect errors, warnings and notes. An error in one part does not stop the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from ..errors import MegatronExtError

T = TypeVar("T")


@dataclass
class Findings:
    """The findings so far.

    Args:
        errors: Errors for which the resume would be refused.
        warnings: Risks that the user should know.
        notes: Assumptions, and facts that cannot be determined offline.
    """

    errors: list[MegatronExtError] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def refuse(self, error: MegatronExtError) -> None:
        """Add an error unless it is there already."""
        if str(error) not in map(str, self.errors):
            self.errors.append(error)

    def tried(self, call: Callable[[], T], notes: list[str] | None = None) -> T | None:
        """Call a function; its error refuses the resume or, with `notes`, becomes a note."""
        try:
            return call()
        except MegatronExtError as e:
            if notes is None:
                self.refuse(e)
            else:
                notes.append(str(e))
            return None

    def scheduled(self, call: Callable[[], T]) -> T | None:
        """Call Megatron's scheduler; its error becomes a note if nothing is refused already.

        A load sets values without the checks with which the scheduler is constructed, so that what
        the scheduler does not accept is no reason to refuse; the preflight checks the arguments.
        """
        return self.tried(call, [] if self.errors else self.notes)


def quietly(call: Callable[[], T]) -> T | None:
    """Call a function; None for an error, which the preflight has reported already."""
    try:
        return call()
    except MegatronExtError:
        return None
