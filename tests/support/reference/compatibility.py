"""What is supported, refused and used, as far as the code says it."""

from __future__ import annotations

import argparse

import tomllib

from megatron_ext.checkpoint.state import unreadable_sharding
from megatron_ext.host import arguments
from megatron_ext.host.contract import CONTRACT, TESTED

from ..hosts import HOSTS, Host
from ..pool import ROOT
from .markdown import blocks, code, table, words

#: Flags of Megatron that may be refused, each as `preflight.refused_flags` looks at it.
_SUSPECTS = (
    {"optimizer": "sgd", "use_distributed_optimizer": True},
    {"optimizer": "muon", "use_distributed_optimizer": True, "ckpt_format": "torch"},
    {"use_megatron_fsdp": True},
    {"use_torch_fsdp2": True},
    {"non_persistent_ckpt_type": "local"},
)

#: Every sharding of a distributed optimizer's state that some Megatron has written.
_SHARDINGS = (
    "dp_reshardable",
    "fully_reshardable",
    "dp_zero_gather_scatter",
    "fully_sharded_model_space",
    "fully_sharded_bucket_space",
)


def versions() -> str:
    """Versions of megatron-core, Python and torch, from the contract and pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needs = [*project["dependencies"], *project["optional-dependencies"]["megatron"]]
    needed = {name: bound for name, _, bound in (need.partition(">=") for need in needs)}
    rows = [
        ("megatron-core, tested", ", ".join(map(code, TESTED))),
        ("megatron-core, accepted", f"`{needed['megatron-core']}` or later; see below"),
        ("torch", f"`{needed['torch']}` or later"),
        ("Python", f"`{project['requires-python'].removeprefix('>=')}` or later"),
    ]
    return table(("package", "version"), rows)


def hosts() -> str:
    """The programs that call Megatron, from the table whose tests CI runs."""

    def checked(host: Host) -> str:
        tests = ", ".join(map(code, host.tests))
        if host.runs:
            return f"run: {tests}"
        return f"source read; its imports and calls are run: {tests}" if tests else "source read"

    rows = [(words(h.name), words(h.version), words(h.way_in), checked(h)) for h in HOSTS]
    return table(("host", "version", "way in", "checked"), rows)


def refused() -> str:
    """What stops with its name: the messages, from the functions that give them."""
    flags = []
    for suspect in _SUSPECTS:
        args = argparse.Namespace(optimizer_class="CLASS", **suspect)
        for message in arguments.refused_flags(args):
            flag, _, reason = message.partition(" with ")[2].partition(": ")
            flags.append((code(flag), words(reason)))
    shardings = [(s, unreadable_sharding(s)) for s in _SHARDINGS]
    forms = [(code(s), words(reason)) for s, reason in shardings if reason]
    return blocks(
        table(("Megatron's flag", "why it is refused"), flags),
        table(("sharding of the optimizer state", "why it is refused"), forms),
    )


def contract() -> str:
    """The names of Megatron that are used; those that are rebound first."""
    out = []
    for rebound, title in ((True, "Rebound in memory"), (False, "Called or overridden")):
        rows = [
            (code(f"{name.module}.{name.attribute}"), name.since, words(name.reference))
            for name in CONTRACT
            if name.rebound == rebound
        ]
        out += [f"## {title}", table(("name", "since megatron-core", "where, and what for"), rows)]
    return blocks(*out)
