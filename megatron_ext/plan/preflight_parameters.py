"""Check the names in a policy against a checkpoint's metadata, before a model is built."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

from ..base.patterns import compiled
from ..base.text import first_of
from ..checkpoint.names import MASTER, OBJECT, WEIGHTS, Style, index
from ..checkpoint.stored import StoredCheckpoint
from ..errors import PlanError
from ..policy.match import Match
from ..policy.parameter_map import ParameterMap
from ..policy.policy import ResumePolicy
from .matching import unmatched
from .mean_of import means_of, sources_of

#: The ways in which a model may name what is stored.
_STYLES = tuple(itertools.starmap(Style, itertools.product((False, True), repeat=2)))


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


def check_rules(stored: StoredCheckpoint, policy: ResumePolicy) -> Iterator[PlanError]:
    """Yield the refusals of rules that name no parameter of the checkpoint.

    Only names are compared: dimensions and attributes of param_groups belong to the model. A model
    that differs from the checkpoint may have more names.

    Args:
        stored: The checkpoint. Its index is read, but no tensor.
        policy: The policy, without operations that have been done already.
    """
    if policy.parameters or not policy.rules or stored.store is None:
        return
    names = _Names(stored)
    if policy.strict:
        used = {i for i, rule in enumerate(policy.rules) if names.any(compiled(rule.match.name))}
        if idle := unmatched(policy, used, range(len(policy.groups)), names.examples):
            yield PlanError(
                f"{idle} in {stored.directory}. Correct the rule, or pass --no-selective-strict"
            )
    for one in means_of(policy):
        if not names.any(compiled(one.parameter)):
            try:
                sources_of(one, (), names.examples)
            except PlanError as e:
                yield e


class _Names:
    """The names that a model may have for a checkpoint's parameters that hold moments."""

    def __init__(self, stored: StoredCheckpoint) -> None:
        own = Style.of_arguments(stored.args)
        self._styles = sorted(_STYLES, key=lambda style: style != own)
        self._stored, self._of_style = stored, dict[Style, tuple[str, ...]]()

    def any(self, fits: Callable[[str], object]) -> bool:
        """Whether a name fits. Those of other styles are made only if none of the first does."""
        return any(fits(name) for style in self._styles for name in self._of(style))

    @property
    def examples(self) -> tuple[str, ...]:
        """Some of them."""
        first = self._of(self._styles[0])
        return tuple(dict.fromkeys((*first[:1], *first[-1:])))

    def _of(self, style: Style) -> tuple[str, ...]:
        if style not in self._of_style:
            both = list(index(self._stored.tensors, style))
            with_moments = [n for k, n in both if k not in (MASTER, OBJECT, WEIGHTS)]
            found = with_moments or [n for k, n in both if k == WEIGHTS]
            # The two halves of a gated layer are stored apart, and are one parameter.
            whole = (n[:-2] if n.endswith(("_w", "_v")) else n for n in found)
            self._of_style[style] = tuple(sorted({*whole}))
        return self._of_style[style]


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
