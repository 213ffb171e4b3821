"""Errors a user can meet. Each message names the thing, what was found and the way out."""

from __future__ import annotations


def printable(text: str, keep: str = "") -> str:
    r"""Escape every character that is not printable, as in ``\x1b``.

    Args:
        text: Any text.
        keep: Characters that are left as they are.
    """
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text
    )


#: Characters of a message, which may quote a file.
_LONGEST = 20_000


class MegatronExtError(RuntimeError):
    """Base class of every error raised by this package.

    Args:
        message: The text. It may quote a checkpoint, and a traceback prints it as it is: characters
            that a terminal may obey are escaped.
    """

    def __init__(self, message: str = "") -> None:
        """Escape what is not printable, and leave out the middle of what nobody can read."""
        if (more := len(message) - _LONGEST) > 0:
            half = _LONGEST // 2
            message = f"{message[:half]} ... ({more} characters) ... {message[-half:]}"
        super().__init__(printable(message, keep="\n"))


class PolicyError(MegatronExtError, ValueError):
    """What the user asked for contradicts itself or names something that cannot be decided."""


class PlanError(MegatronExtError):
    """The policy cannot be carried out on this checkpoint with these parameter groups."""


class CheckpointError(MegatronExtError):
    """The checkpoint lacks the optimizer state that is to be kept, or does not fit the model."""


class AgreementError(MegatronExtError):
    """The ranks came to different decisions, or another rank refused."""


class HostError(MegatronExtError):
    """The installed Megatron, or the way it was launched, is not one this package can serve."""


class GuardError(MegatronExtError):
    """The first steps after a resume are not those that were planned."""
