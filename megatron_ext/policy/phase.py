"""A transition happens exactly once: the mark that the checkpoints of a phase carry. Pure.

Jobs are restarted with the same command line. So that a restart goes on with the phase instead of
beginning it again, every param_group carries one plain string that says which phase it is in. A key
of a param_group survives save and load in every format, stock Megatron's included.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ..base.values import plain
from ..checkpoint.state import MARK_KEY, DirectoryRole
from ..errors import CheckpointError, PlanError
from .policy import ResumePolicy

#: Saved arguments by which two checkpoints are told apart, on every rank the same.
_TELLING_ARGUMENTS = (
    "seed",
    "save",
    "consumed_train_samples",
    "global_batch_size",
    "num_layers",
    "hidden_size",
    "train_iters",
    "train_samples",
    "data_path",
)


@dataclass(frozen=True)
class Mark:
    """Which phase a checkpoint belongs to.

    Args:
        phase: Its name, or empty.
        source: The checkpoint that it started from, as `identity` names it.
        operations: Digest of what must not be done twice (`digest_of`).
        offset: Data position minus what the iteration counter has counted, in samples.
        done: The operations in words, for messages.
    """

    phase: str
    source: str
    operations: str
    offset: int = 0
    done: tuple[str, ...] = field(default=(), compare=False)

    def __str__(self) -> str:
        """The plain string that is saved."""
        content = {
            "phase": self.phase,
            "from": self.source,
            "operations": self.operations,
            "offset": self.offset,
            "done": list(self.done),
        }
        return json.dumps(content)

    @classmethod
    def parse(cls, text: str) -> Mark:
        """Read a saved mark.

        Raises:
            CheckpointError: It is none.
        """
        try:
            content = json.loads(text)
            named = [content[key] for key in ("phase", "from", "operations")]
            offset = content["offset"]
            whole = isinstance(offset, int) and not isinstance(offset, bool)
            done = content["done"]
            texts = [*named, *done] if isinstance(done, list) else [None]
            if not whole or not all(isinstance(value, str) for value in texts):
                raise TypeError
        except (TypeError, ValueError, KeyError, RecursionError):
            shown = text if len(text) < 300 else f"{text[:300]} ..."
            raise CheckpointError(
                f"the checkpoint's param_groups carry {MARK_KEY} = {shown!r}, which no version of "
                "this package has written; expected phase, from, operations, offset and done. "
                "The checkpoint was edited, or written by a newer version"
            ) from None
        return cls(named[0], named[1], named[2], offset, tuple(done))

    def told(self) -> str:
        """The phase in a message."""
        name = f"phase {self.phase!r}" if self.phase else "a phase without a name"
        done = ", ".join(self.done) or "no change of state"
        return f"{name}, started from {self.source} with: {done}"


@dataclass(frozen=True)
class Phase:
    """What a resume is, with regard to phases.

    Args:
        state: ``none``: nothing that must happen once was asked for; ``applied``: the phase begins
            here; ``continued``: the checkpoint is the phase's own.
        mark: What the checkpoints that this run writes carry.
        asked: What the user asked.
        policy: What is left of it to do.
        why: In one sentence.
        source: The checkpoint that is loaded (`identity`).
    """

    state: Literal["none", "applied", "continued"]
    mark: Mark | None
    asked: ResumePolicy
    policy: ResumePolicy
    why: str
    source: str = ""

    def at(self, offset: int) -> Phase:
        """The same, with the data position's offset in the mark."""
        mark = None if self.mark is None else replace(self.mark, offset=offset)
        return replace(self, mark=mark)


def decide(
    policy: ResumePolicy, saved: Mark | None, source: str, where: DirectoryRole = "load"
) -> Phase:
    """Tell a transition from a restart.

    Args:
        policy: What the user asked.
        saved: The checkpoint's mark.
        source: The checkpoint's identity.
        where: Which directory it lies in.

    Raises:
        PlanError: The checkpoint is another phase's, where only this one's can be continued.
    """
    digest = digest_of(policy)
    offset = 0 if saved is None else saved.offset
    begun = Phase(
        "applied",
        Mark(policy.phase, source, digest, offset, policy.operations),
        policy,
        policy,
        f"starts from {source}: {', '.join(policy.operations) or 'no change of state'}",
        source,
    )
    if where == "start":
        return begun
    if not policy.operations and not policy.phase and where == "load":
        return Phase("none", saved, policy, policy, "no operation that must happen once", source)
    same_name = saved is not None and saved.phase == policy.phase
    if saved is not None and same_name and (not policy.operations or saved.operations == digest):
        return Phase(
            "continued",
            saved,
            policy,
            policy.without_operations(),
            f"the checkpoint is of this phase already ({saved.told()}): moments, step and counters "
            "go on as they are. To begin another phase in the same way, give --selective-phase "
            "NAME or --selective-from",
            source,
        )
    if where == "own":
        raise PlanError(_not_its_own(policy, saved))
    if saved is not None and same_name and policy.phase:
        raise PlanError(
            f"--selective-phase {policy.phase}: the checkpoint is of {saved.told()}; expected "
            f"{', '.join(policy.operations)}. Restore the flags the phase was "
            "started with (or leave out all that change moments, step or counters) to go on with "
            "it, or give another name to begin a new phase"
        )
    return begun


def digest_of(policy: ResumePolicy) -> str:
    """Digest of what must not be done twice; 16 hex digits, ``none`` if there is nothing."""
    if not policy.operations:
        return "none"
    return hashlib.sha256("\n".join(policy.operations).encode()).hexdigest()[:16]


def identity(
    name: str,
    iteration: int,
    arguments: Mapping[str, Any],
    groups: Sequence[Mapping[str, Any]],
    step: int | None,
) -> str:
    """What tells a checkpoint from others: a name for people, then a digest.

    Args:
        name: Of its directory.
        iteration: Of the checkpoint.
        arguments: The saved arguments; a few plain ones count.
        groups: The saved param_groups, without ``params``.
        step: The optimizer's.
    """
    telling = {key: repr(arguments.get(key)) for key in _TELLING_ARGUMENTS}
    known = [
        {k: repr(x) for k, v in g.items() if isinstance(x := plain(v), int | float | str)}
        for g in groups
    ]
    content = json.dumps([iteration, step, telling, known], sort_keys=True)
    return f"{name}@{iteration}#{hashlib.sha256(content.encode()).hexdigest()[:16]}"


def same_checkpoint(one: str, other: str) -> bool:
    """Whether two identities are of one checkpoint, wherever its directory lies."""
    return one.rpartition("@")[2] == other.rpartition("@")[2]


def _not_its_own(policy: ResumePolicy, saved: Mark | None) -> str:
    found = "no mark of a phase" if saved is None else saved.told()
    name = f"phase {policy.phase!r}" if policy.phase else "a phase without a name"
    return (
        f"the directory of --load and --save holds a checkpoint of another phase: found {found}; "
        f"expected {name} with: {', '.join(policy.operations) or 'no change of state'}. With "
        "--selective-from, --load and --save are the new phase's own directory: name an empty one "
        "to begin a phase, or restore the flags this one was started with to go on with it"
    )
