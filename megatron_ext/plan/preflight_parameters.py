"""Check a parameter map against a checkpoint's metadata, before a model is built."""

from __future__ import annotations

from ..base.text import first_of
from ..checkpoint.names import MASTER, OBJECT, WEIGHTS, Style, index
from ..checkpoint.stored import StoredCheckpoint
from ..errors import PlanError
from ..policy.match import Match
from ..policy.parameter_map import ParameterMap


def check_parameters(stored: StoredCheckpoint, asked: ParameterMap) -> None:
    """Refuse a map that cannot be applied to any model.

    Args:
        stored: The checkpoint. Its index is read, but no tensor.
        asked: What the user says about parameters.

    Raises:
        PlanError: The state has no names, or a pattern to drop matches nothing that is stored.
    """
    if not asked:
        return
    if is_by_position(stored):
        raise unnamed(asked)
    styles = Style(local=True), Style()
    names = {n for s in styles for k, n in index(stored.tensors, s) if k not in (MASTER, OBJECT)}
    for pattern in asked.drop:
        if names and not any(Match(pattern).fits(name, 0, {}) for name in names):
            moments = {n for k, n in index(stored.tensors, styles[1]) if k != WEIGHTS}
            raise PlanError(
                f"--selective-drop-parameters {pattern}: it matches no parameter of the checkpoint "
                f"in {stored.directory}, which has {first_of(sorted(moments))}. Correct the "
                "pattern or leave it out"
            )


def is_by_position(stored: StoredCheckpoint) -> bool:
    """Whether the optimizer state is stored by position, without names of parameters."""
    by_bucket = ("dp_reshardable", "dp_zero_gather_scatter")
    return stored.format == "torch" or stored.sharding_type in by_bucket


def unnamed(asked: ParameterMap) -> PlanError:
    """Make the error for a map and a checkpoint that does not name what it stores."""
    return PlanError(
        f"{', '.join(asked.operations())}: the checkpoint's optimizer state does not name "
        "parameters (dp_reshardable and legacy torch store it by position), so that it cannot be "
        "mapped; expected --ckpt-format torch_dist with --dist-ckpt-optim-fully-reshardable, or "
        "without the distributed optimizer. Convert a dp_reshardable checkpoint: python -m "
        "megatron_ext convert SOURCE TARGET --to fully_reshardable; for legacy torch run its "
        "configuration for one more save with these flags. Resume from the new one"
    )
