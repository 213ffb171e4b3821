"""The JSON document of ``env``, as types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, TypedDict

from ..base.schema import Keywords, Versioned

SCHEMA = "megatron_ext/env/1"
#: Packages whose versions are told, by the names of their distributions.
PACKAGES = ("torch", "megatron-core", "transformer-engine", "apex")


class MegatronDocument(TypedDict):
    """The megatron-core that is imported.

    Attributes:
        version: Without the local part, from its own files; null where there is none.
        tested_versions: Those that this package's tests run against.
        tested: Whether it is one of them.
        in_tested_range: Whether it lies between the first and the last of them.
        training: Whether megatron.training, the training loop, is there.
        contract: Names of Megatron that this package leans on and that are gone or have changed, or
            why it cannot be used at all; empty where all is well.
    """

    version: str | None
    tested_versions: list[str]
    tested: bool
    in_tested_range: bool
    training: bool
    contract: list[str]


_Class = TypedDict("_Class", {"class": str | None})


class InnerOptimizerDocument(_Class):
    """The Adam inside Megatron's optimizers.

    Attributes:
        class: Dotted path.
        reason: Why it is torch's and not a FusedAdam; empty where it is one.
        not_importable: Of transformer-engine and apex those that are installed and cannot be
            imported, and why.
    """

    reason: str
    not_importable: Mapping[str, str]


class KernelDocument(TypedDict):
    """The kernel of a device.

    Attributes:
        active: native: compiled. reference: plain torch.
        reason: What it was built with, or why it is not there.
    """

    active: Literal["native", "reference"]
    reason: str


class EnvDocument(Versioned):
    """What ``python -m megatron_ext env --json`` prints.

    That is what is installed, what is active, and why not.

    Attributes:
        status: The exit status: 0; 1 where there are findings; 2 where Megatron lacks what this
            package leans on.
        findings: What is not as it should be, in words.
        versions: Package -> version of what is imported; null where it is not installed.
        paths: Package -> folder that it is imported from; null where it is not installed.
        megatron: The megatron-core that is imported.
        inner_optimizer: The Adam inside Megatron's optimizers.
        cuda_devices: Names.
        MEGATRON_EXT_KERNEL: The environment variable.
        kernels: Which kernel serves which device.
    """

    status: Literal[0, 1, 2]
    findings: list[str]
    versions: Annotated[
        Mapping[str, str | None], Keywords(required=["megatron_ext", "python", *PACKAGES])
    ]
    paths: Annotated[Mapping[str, str | None], Keywords(required=list(PACKAGES))]
    megatron: MegatronDocument
    inner_optimizer: InnerOptimizerDocument
    cuda_devices: list[str]
    MEGATRON_EXT_KERNEL: Annotated[str, Keywords(enum=["auto", "native", "reference"])]
    kernels: Annotated[
        Mapping[str, KernelDocument],
        Keywords(required=["cpu", "cuda"], propertyNames={"enum": ["cpu", "cuda"]}),
    ]
