"""param_groups as Megatron makes them, and hypothesis strategies for them."""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st

# No deadline: the first example pays for imports, and a loaded machine is slow.
settings.register_profile("megatron_ext", deadline=None, max_examples=60, database=None)
settings.load_profile("megatron_ext")

#: Structural keys of `megatron.core.optimizer._get_param_groups`, written out once more.
STRUCTURE = ("is_expert_parallel", "wd_mult", "lr_mult", "is_decoupled_lr")


def group(**changes: Any) -> dict[str, Any]:
    """One group of phase 1: `_get_param_groups` of 0.19 plus FusedAdam's defaults."""
    return {
        "is_expert_parallel": False,
        "default_config": True,
        "wd_mult": 1.0,
        "lr_mult": 1.0,
        "is_decoupled_lr": False,
        "max_lr": 3e-3,
        "min_lr": 3e-4,
        "lr": 2e-3,
        "bias_correction": True,
        "betas": (0.9, 0.95),
        "eps": 1e-8,
        "weight_decay": 0.1,
        **changes,
    }


def without(group: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {k: v for k, v in group.items() if k not in keys}


def structure(group: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(group[k] for k in STRUCTURE)


_STRUCTURES = st.fixed_dictionaries(
    {
        "is_expert_parallel": st.booleans(),
        "wd_mult": st.sampled_from((0.0, 1.0)),
        "lr_mult": st.sampled_from((0.1, 1.0)),
        "is_decoupled_lr": st.just(False),
    }
)

# Few values each, so that groups often have some of them in common.
_VALUES = st.fixed_dictionaries(
    {
        "default_config": st.booleans(),
        "max_lr": st.sampled_from((3e-3, 1e-3, 3e-4)),
        "min_lr": st.sampled_from((3e-4, 3e-5)),
        "lr": st.sampled_from((0.0, 1e-3)),
        "betas": st.sampled_from(((0.9, 0.95), (0.9, 0.999))),
        "eps": st.sampled_from((1e-8, 1e-6)),
        "weight_decay": st.sampled_from((0.0, 0.1)),
    },
    optional={
        "bias_correction": st.booleans(),
        "start_wd": st.sampled_from((None, 0.0, 0.1)),
        "end_wd": st.sampled_from((None, 0.1)),
    },
)

#: Any group, and lists of groups that may share their structure.
GROUPS = st.builds(lambda s, v: {**s, **v}, _STRUCTURES, _VALUES)
LISTS = st.lists(GROUPS, min_size=1, max_size=4)
#: Lists in which the structure tells every group from the others.
DISTINCT = st.lists(GROUPS, min_size=1, max_size=4, unique_by=structure)

#: Keys that can be kept and that every generated group has.
KEEPABLE = ("betas", "eps", "weight_decay", "max_lr", "min_lr", "default_config")
KEEPS = st.lists(st.sampled_from(KEEPABLE), max_size=3, unique=True).map(tuple)
STEPS = st.none() | st.integers(min_value=1, max_value=10**6)
