"""The order of the parameters in a buffer. Pure.

A buffer has the parameters in the reverse order of their registration
(core/optimizer/distrib_optimizer.py:547, 0.19.2). A rank lists its state in that order when it
saves, and the index keeps it as long as one rank has written all of it. If data-parallel ranks have
shared the work (``--ckpt-fully-parallel-save``), the order is that in which Megatron's modules
register their parameters.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..checkpoint.names import Style
from . import registration
from .shifted_held import LAYER, Held, is_expert
from .shifted_ranks import Ranks

#: The parts of a model in a buffer; what is in none of them is between the second and the third.
_PARTS = (r"output_layer\.", r"mtp\.", r"(?:.*\.)?layers\.", r"embedding\.")


def in_order(mine: Sequence[Held], style: Style, alone: bool, ranks: Ranks) -> list[Held]:
    """Sort what one rank held as in its buffers, and note the buffers.

    Args:
        mine: What it held, as the index lists it.
        style: How the model names its parameters.
        alone: Whether one rank has written all of it.
        ranks: The ranks of the run.
    """
    listed = {key: number for number, key in enumerate(dict.fromkeys(h.key for h in mine))}
    order = listed if alone else {key: -_registered(key, style) for key in listed}
    stages = _stages(mine, alone, ranks)
    last = max(stages.values(), default=0)
    apart = ranks.experts_apart
    if apart is None:
        apart = _experts_follow(order)
    block: dict[int | None, int] = {}
    for held in mine:
        if is_expert(held.key):
            block[held.layer] = min(order[held.key], block.get(held.layer, order[held.key]))

    def place(held: Held) -> tuple[float, ...]:
        part, layer, number = _part(held.key), held.layer, order[held.key]
        in_layer = (number, 0, 0)
        if is_expert(held.key):
            # Grouped experts are parameters of one module, others are modules of their own.
            in_layer = (block[layer], -held.expert, number)
            if style.grouped:
                in_layer = (number, -held.expert, 0)
        return (buffer_of(held)[0], part, -(layer or 0), *in_layer)

    def buffer_of(held: Held) -> tuple[int, bool]:
        stage = 0 if held.key.startswith("embedding.") else last
        if held.layer is not None:
            stage = stages.get(held.layer, last)
        return stage, bool(apart) and is_expert(held.key)

    return [replace(h, buffer=buffer_of(h)) for h in sorted(mine, key=place)]


def _part(key: str) -> float:
    for number, pattern in enumerate(_PARTS):
        if re.match(pattern, key):
            return number
    return 1.5


def _stages(mine: Sequence[Held], alone: bool, ranks: Ranks) -> dict[int, int]:
    """Return layer -> number of the virtual stage. Within a stage layers descend."""
    stages: dict[int, int] = {}
    if not alone:
        stage, before = 0, None
        for layer in sorted({h.layer for h in mine if h.layer is not None}):
            if ranks.virtual and before is not None and layer > before + 1:
                stage += 1
            stages[layer], before = stage, layer
        return stages
    layers: dict[str, list[int]] = defaultdict(list)
    for held in mine:
        found = LAYER.fullmatch(held.key)
        if found is not None and held.layer is not None and not held.key.startswith("mtp."):
            layers[found["rest"]].append(held.layer)
    for listed in layers.values():
        stage = 0
        for at, layer in enumerate(listed):
            stage += at > 0 and layer > listed[at - 1]
            stages.setdefault(layer, stage)
    return stages


def _experts_follow(order: Mapping[str, int]) -> bool:
    """Whether the index has the experts behind everything else of the layers."""
    experts = [number for key, number in order.items() if is_expert(key)]
    others = [n for key, n in order.items() if not is_expert(key) and LAYER.fullmatch(key)]
    return bool(experts and others) and min(experts) > max(others)


def _registered(key: str, style: Style) -> int:
    """Return a number that is larger the later a parameter is registered in its layer."""
    found = LAYER.fullmatch(key)
    rest = (key if found is None else found["rest"]).removeprefix("transformer_layer.")
    number = registration.number(rest, style.local)
    return registration.LAST if number is None else number
