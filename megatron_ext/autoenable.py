"""Enable selective resumes when this module is imported.

It is for hosts that cannot call a function but can import a module, such as a plugin of an RL
framework. The policy is in a file: ``import megatron_ext.autoenable`` is
``megatron_ext.enable(policy=..., report_dir=...)``.

Environment:
    MEGATRON_EXT_POLICY: The policy file, or ``default`` for the default policy. It has no default,
        so that a rank that does not get the variable stops.
    MEGATRON_EXT_REPORT: Where rank 0 writes the resume report; none is written without it.
"""

from __future__ import annotations

import os

from .api import enable
from .errors import HostError
from .hooks.enabled import Enabled

_POLICY, _REPORT = "MEGATRON_EXT_POLICY", "MEGATRON_EXT_REPORT"


def _enable() -> Enabled:
    policy = os.environ.get(_POLICY)
    if not policy:
        raise HostError(
            f"import megatron_ext.autoenable: the environment variable {_POLICY} is not set; "
            "expected the path of a policy file, or default. Set it on every rank (frameworks on "
            "Ray pass variables on only if they are told to)"
        )
    report_dir = os.environ.get(_REPORT)
    return enable(None if policy == "default" else policy, report_dir=report_dir)


#: What a training loop asks for its counters.
enabled = _enable()
