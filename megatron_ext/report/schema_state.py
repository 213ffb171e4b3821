"""Types of the tensors of an optimizer's state in a report, by kind of optimizer.

The kinds are those of `megatron_ext.host.optimizers.TABLE`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, TypedDict

from ..base.schema import Count, Keywords
from .schema_parts import Value


class AdamTensorsDocument(TypedDict):
    """The state tensors of Adam and LaProp.

    Attributes:
        param: The fp32 master weights.
        exp_avg: The first moments.
        exp_avg_sq: The second moments.
    """

    param: Count
    exp_avg: Count
    exp_avg_sq: Count


class SoapTensorsDocument(TypedDict):
    """The state tensors of SOAP.

    Attributes:
        param: The fp32 master weights.
        exp_avg: The first moments.
        exp_avg_sq: The second moments.
        state: All other state.
    """

    param: Count
    exp_avg: Count
    exp_avg_sq: Count
    state: Count


class LionTensorsDocument(TypedDict):
    """The state tensors of Lion.

    Attributes:
        param: The fp32 master weights.
        exp_avg: The first moments.
    """

    param: Count
    exp_avg: Count


class MomentumTensorsDocument(TypedDict):
    """The state tensors of SGD, Muon and its kin.

    Attributes:
        param: The fp32 master weights.
        momentum_buffer: The first moments.
    """

    param: Count
    momentum_buffer: Count


class AdaptiveTensorsDocument(TypedDict):
    """The state tensors of Adaptive Muon.

    Attributes:
        param: The fp32 master weights.
        momentum_buffer: The first moments.
        moment2_buffer: The second moments.
    """

    param: Count
    momentum_buffer: Count
    moment2_buffer: Count


class MoreMomentumTensorsDocument(TypedDict):
    """The state tensors of Muon's kin with state of another shape.

    Attributes:
        param: The fp32 master weights.
        momentum_buffer: The first moments.
        state: All other state.
    """

    param: Count
    momentum_buffer: Count
    state: Count


class WeightsOnlyDocument(TypedDict):
    """The state tensors of SGD without momentum.

    Attributes:
        param: The fp32 master weights.
    """

    param: Count


class NothingLoadedDocument(TypedDict):
    """The state tensors of a live optimizer, for which nothing was loaded."""


PerStateTensor = Annotated[
    Mapping[str, int],
    Keywords(
        "per_state_tensor",
        of=AdamTensorsDocument
        | SoapTensorsDocument
        | LionTensorsDocument
        | MomentumTensorsDocument
        | AdaptiveTensorsDocument
        | MoreMomentumTensorsDocument
        | WeightsOnlyDocument
        | NothingLoadedDocument,
        description="One number for each tensor of the optimizer's state.",
    ),
]


class MomentStateDocument(TypedDict):
    """One moment, over all ranks.

    Attributes:
        rms_before: Root mean square before, over the elements that were read; null if none was.
        rms_after: Root mean square after.
        changed: Number of read elements whose value differs from before.
        nonfinite: Number of elements that cannot be used after: NaN, infinite, or negative in a
            second moment.
        unread: Number of elements that were not read from the checkpoint, because the whole moment
            of their parameter is overwritten.
    """

    rms_before: Value
    rms_after: Value
    changed: Count
    nonfinite: Count
    unread: Count


class BothMomentsDocument(TypedDict):
    """Statistics of each moment of Adam, SOAP and LaProp over all elements.

    Attributes:
        exp_avg: The first moments.
        exp_avg_sq: The second moments.
    """

    exp_avg: MomentStateDocument
    exp_avg_sq: MomentStateDocument


class LionMomentDocument(TypedDict):
    """Statistics of the moment of Lion over all elements.

    Attributes:
        exp_avg: The first moments.
    """

    exp_avg: MomentStateDocument


class MomentumDocument(TypedDict):
    """Statistics of the moment of SGD, Muon and its kin over all elements.

    Attributes:
        momentum_buffer: The first moments.
    """

    momentum_buffer: MomentStateDocument


class AdaptiveMomentsDocument(TypedDict):
    """Statistics of each moment of Adaptive Muon over all elements.

    Attributes:
        momentum_buffer: The first moments.
        moment2_buffer: The second moments.
    """

    momentum_buffer: MomentStateDocument
    moment2_buffer: MomentStateDocument


PerMoment = Annotated[
    Mapping[str, MomentStateDocument],
    Keywords(
        "per_moment",
        of=BothMomentsDocument | LionMomentDocument | MomentumDocument | AdaptiveMomentsDocument,
        description="Statistics of each moment of the optimizer.",
    ),
]
