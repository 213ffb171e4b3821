"""Everything that depends on Megatron's private names and versions, in one place.

`install` rebinds a few module attributes of the installed, unmodified megatron-core; each is listed
in `CONTRACT` with the upstream file. The replacements do nothing unless a request is active: the
launcher's, a library call's, or ``--optimizer-class`` among Megatron's parsed arguments.
Megatron's own files are never edited or copied.
"""

from .buckets import bucket_layout
from .contract import (
    CONTRACT,
    CORE,
    TESTED,
    TRAINING,
    HostName,
    check_contract,
    contract_problems,
    has_training,
    in_tested_range,
    inner_adam,
    megatron_version,
)
from .installing import install
from .loading import dropping_flag, needs_optimizer
from .members import adam_optimizers, members_of
from .request import (
    DEFAULT_CLASS,
    Request,
    active_request,
    launch_request,
    megatron_parser,
    parse_arguments,
    requested,
    require_built,
    resolve_class,
)

__all__ = [
    "CONTRACT",
    "CORE",
    "DEFAULT_CLASS",
    "TESTED",
    "TRAINING",
    "HostName",
    "Request",
    "active_request",
    "adam_optimizers",
    "bucket_layout",
    "check_contract",
    "contract_problems",
    "dropping_flag",
    "has_training",
    "in_tested_range",
    "inner_adam",
    "install",
    "launch_request",
    "megatron_parser",
    "megatron_version",
    "members_of",
    "needs_optimizer",
    "parse_arguments",
    "requested",
    "require_built",
    "resolve_class",
]
