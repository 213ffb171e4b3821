r"""The state of every optimizer that Megatron can build: one table.

A row says which tensors of the state are moments and of which order, which decay they have, where
the optimizer counts its steps and which hyperparameters a param_group has. Every other module asks
`state_of`. A new optimizer is one row of `TABLE`.

A moment x of order n follows, at each step with the gradient g,

.. math:: x \leftarrow b x + (1 - b) g^n \quad\text{(average)}, \qquad
    x \leftarrow b x + g \quad\text{(sum)}

Sources: torch/optim/adamw.py and sgd.py; transformer_engine/pytorch/optimizers/fused_adam.py and
fused_sgd.py; emerging-optimizers 0.3.0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..errors import HostError
from ..rules.form import MOMENTS

#: A key of a param_group, and the position in its pair.
Decay = tuple[str, int | None]


@dataclass(frozen=True)
class Moment:
    """A tensor of the state with the shape of the parameter.

    Args:
        tensor: Its key in the state.
        order: 1 for a moment of the gradient, 2 for one of its square. A policy's rule for exp_avg
            is for the moment of order 1, whatever its tensor is called, and that for exp_avg_sq for
            the moment of order 2.
        decay: The hyperparameter b.
        average: Whether it is an average; otherwise a sum.
        of_gradient: Whether it is a moment of the gradient itself. Otherwise of a normalised one,
            whose size does not follow the gradient's.
    """

    tensor: str
    order: Literal[1, 2]
    decay: Decay
    average: bool = True
    of_gradient: bool = True

    def decay_in(self, group: Mapping[str, Any]) -> float:
        """Return b in a param_group."""
        key, position = self.decay
        value = group[key] if position is None else group[key][position]
        return float(value)


@dataclass(frozen=True)
class OptimizerState:
    """One row of the table.

    Args:
        name: Its name in messages.
        classes: Names of the classes whose state it is, and that of their subclasses.
        moments: The moments, by order.
        hyperparameters: The keys of a param_group that the update reads.
        step: Where the steps are counted: in each param_group, or in each parameter's state. None
            if the update does not depend on their number.
        others: Other tensors of the state, which are kept as they are.
        adam: Whether the update is Adam's, from which the cautions and the hyperparameter changes
            of presets are derived.
        bias_correction: Whether the moments are divided by 1 - b^t.
        rotated: Whether an element of a moment does not belong to the same element of the
            parameter. Only rules that treat all elements alike have a meaning then.
        follows_scale: Whether moments, each scaled by its power, are the state of a run with a
            scaled gradient.
        scale_free: Whether the update is then the same.
        coupled_decay: Whether weight decay is always added to the gradient.
    """

    name: str
    classes: tuple[str, ...]
    moments: tuple[Moment, ...]
    hyperparameters: tuple[str, ...]
    step: Literal["group", "state"] | None = None
    others: tuple[str, ...] = ()
    adam: bool = False
    bias_correction: bool = False
    rotated: bool = False
    follows_scale: bool = True
    scale_free: bool = True
    coupled_decay: bool = False

    @property
    def tensors(self) -> tuple[str, ...]:
        """The keys of the moments in the state."""
        return tuple(moment.tensor for moment in self.moments)

    def moment(self, key: str) -> Moment | None:
        """Return the moment that a policy's rule for ``exp_avg`` or ``exp_avg_sq`` is for."""
        order = MOMENTS.index(key) + 1
        return next((m for m in self.moments if m.order == order), None)

    def tensor(self, key: str) -> str | None:
        """Return the tensor of a policy's ``exp_avg`` or ``exp_avg_sq``; None if there is none."""
        found = self.moment(key)
        return None if found is None else found.tensor

    def __str__(self) -> str:
        """Write the moments for a message."""
        names = {1: "first moment", 2: "second moment"}
        held = [f"{m.tensor} ({names[m.order]})" for m in self.moments]
        return f"{self.name}: {', '.join(held) or 'no moments'}"


_BETAS: tuple[Decay, Decay] = ("betas", 0), ("betas", 1)
_OF_ADAM = (Moment("exp_avg", 1, _BETAS[0]), Moment("exp_avg_sq", 2, _BETAS[1]))
_MOMENTUM = Moment("momentum_buffer", 1, ("momentum", None))
# Muon and its kin: TensorParallelMuon, MOP, PolarGrad, Scion, Spel and others differ in what they
# make of the momentum.
_MUON = OptimizerState(
    "Muon", ("OrthogonalizedOptimizer",), (_MOMENTUM,), ("lr", "weight_decay", "momentum")
)

ADAM = OptimizerState(
    "Adam",
    ("FusedAdam", "FusedAdamStandIn"),
    _OF_ADAM,
    ("lr", "weight_decay", "betas", "eps"),
    step="group",
    adam=True,
    bias_correction=True,
)
#: The row of a subclass comes before that of its base class.
TABLE = (
    ADAM,
    replace(ADAM, name="Adam of torch", classes=("Adam", "AdamW"), step="state"),
    OptimizerState(
        "SGD",
        ("SGD", "FusedSGD"),
        (replace(_MOMENTUM, average=False),),
        ("lr", "weight_decay", "momentum", "dampening", "nesterov"),
        scale_free=False,
        coupled_decay=True,
    ),
    # Its update interpolates with betas[0], its moment decays with betas[1]
    # (emerging_optimizers/scalar_optimizers/update_functions/lion.py).
    OptimizerState(
        "Lion", ("Lion",), (Moment("exp_avg", 1, _BETAS[1]),), ("lr", "weight_decay", "betas")
    ),
    # The second moment is that of the orthogonalised momentum
    # (emerging_optimizers/orthogonalized_optimizers/adaptive_muon.py).
    OptimizerState(
        "Adaptive Muon",
        ("AdaptiveMuon",),
        (_MOMENTUM, Moment("moment2_buffer", 2, ("beta2", None), of_gradient=False)),
        ("lr", "weight_decay", "momentum", "beta2", "eps"),
    ),
    # The radius that it keeps is a number for each parameter.
    replace(_MUON, name="Muon Hyperball", classes=("MuonHyperball",), others=("hyperball_R",)),
    _MUON,
    # The moments are in the eigenbases Q_L and Q_R of the factors L and R, which a scaled gradient
    # scales too, by a power that depends on use_kl_shampoo (emerging_optimizers/soap/soap.py).
    OptimizerState(
        "SOAP",
        ("SOAP",),
        _OF_ADAM,
        ("lr", "weight_decay", "betas", "eps", "shampoo_beta"),
        step="state",
        others=("L", "R", "Q_L", "Q_R"),
        bias_correction=True,
        rotated=True,
        follows_scale=False,
    ),
    # exp_avg averages the gradient over its root mean square, so that eps has to follow a scaled
    # gradient (emerging_optimizers/scalar_optimizers/update_functions/laprop.py).
    OptimizerState(
        "LaProp",
        ("LaProp",),
        (replace(_OF_ADAM[0], of_gradient=False), _OF_ADAM[1]),
        ("lr", "weight_decay", "betas", "eps", "correct_bias"),
        step="state",
        bias_correction=True,
        follows_scale=False,
    ),
)

#: Keys of second moments, of which an optimizer takes the square root.
SECOND = frozenset(m.tensor for row in TABLE for m in row.moments if m.order == 2)
#: Keys of first moments, which every optimizer with state has.
FIRST = frozenset(m.tensor for row in TABLE for m in row.moments if m.order == 1)
#: Keys of all moments, as a policy's exp_avg and exp_avg_sq name them and as they are stored.
STORED = tuple(dict.fromkeys(tensor for row in TABLE for tensor in row.tensors))


def state_of(inner: Any) -> OptimizerState:
    """Return the row of a torch optimizer.

    Args:
        inner: The optimizer, of any class. CPU offload (HybridDeviceOptimizer) has the state of the
            optimizers inside. None counts as Adam.

    Raises:
        HostError: The table does not know the class.
    """
    if inner is None:
        return ADAM
    parts = getattr(inner, "sub_optimizers", None)
    if parts is not None:
        return state_of(parts[0]) if parts else ADAM
    names = [base.__name__ for base in type(inner).__mro__]
    found = next((row for row in TABLE if set(names) & set(row.classes)), None)
    if found is None:
        raise HostError(
            f"the state of {names[0]} is not known, so that no rule and no check can be applied to "
            f"it; known are {'; '.join(map(str, TABLE))}, and subclasses of their classes. Use one "
            "of these, or leave --optimizer-class out"
        )
    row = _in_use(found, inner.param_groups)
    if getattr(inner, "moment2_method", "adamuon") != "adamuon":
        # One number for each row or column, or one for all.
        return replace(row, moments=row.moments[:1], others=row.tensors[1:])
    return row


def state_of_member(optimizer: Any) -> OptimizerState:
    """Return the row of a Megatron optimizer.

    Without parameters on this rank it has no torch optimizer; its row is then that of the config's
    name, so that all ranks have the same one.
    """
    inner = optimizer.optimizer
    name = getattr(getattr(optimizer, "config", None), "optimizer", "adam")
    by_name = {row.name.lower(): row for row in TABLE}
    return by_name.get(name, ADAM) if inner is None else state_of(inner)


def state_of_group(group: Mapping[str, Any]) -> OptimizerState | None:
    """Return the row whose hyperparameters a stored param_group has; None if no row's are there.

    A stored group does not name its class. Rows with the same keys have the same moments.
    """
    found = [row for row in TABLE if set(row.hyperparameters) <= set(group)]
    # The one with most of its keys; a class with more state than another of the same keys is rarer.
    return max(found, key=lambda row: (len(row.hyperparameters), -len(row.others)), default=None)


def state_of_groups(groups: Sequence[Mapping[str, Any]]) -> OptimizerState | None:
    """Return the row of an optimizer's stored param_groups; None if they name no optimizer."""
    found = (state_of_group(group) for group in groups)
    row = next((row for row in found if row is not None), None)
    return None if row is None else _in_use(row, groups)


def _in_use(row: OptimizerState, groups: Sequence[Mapping[str, Any]]) -> OptimizerState:
    """Leave out what is not kept with the settings of the groups."""
    if row.name == "SGD" and not any(group.get("momentum") for group in groups):
        return replace(row, moments=())  # torch/optim/sgd.py keeps no buffer then
    return row
