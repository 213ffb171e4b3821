"""What is supported, refused and leaned on, as far as the code says it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import tomllib
from docutils import nodes
from sphinx.util.docutils import SphinxDirective

from . import trees

PYPROJECT = Path(__file__).resolve().parents[3] / "pyproject.toml"

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


class Versions(SphinxDirective):
    """The versions of megatron-core, Python and torch."""

    def run(self) -> list[nodes.Node]:
        """From the contract and pyproject.toml."""
        from megatron_ext.host.contract import TESTED

        project = tomllib.loads(PYPROJECT.read_text())["project"]
        needs = [*project["dependencies"], *project["optional-dependencies"]["megatron"]]
        bounds = (need.partition(">=") for need in needs)
        needed = {name: bound for name, _, bound in bounds}
        python = project["requires-python"]
        rows = [
            ("megatron-core, tested", ", ".join(f"`{v}`" for v in TESTED)),
            ("megatron-core, accepted", f"`{needed['megatron-core']}` or later; see below"),
            ("torch", f"`{needed['torch']}` or later"),
            ("Python", f"`{python.removeprefix('>=')}` or later"),
        ]
        return [trees.table(("", ""), rows)]


class Hosts(SphinxDirective):
    """The programs that call Megatron, and what runs them."""

    def run(self) -> list[nodes.Node]:
        """From the table whose tests CI runs."""
        sys.path.insert(0, str(PYPROJECT.parent))
        from tests.support.hosts import HOSTS

        def checked(host: Any) -> str:
            tests = ", ".join(f"`{test}`" for test in host.tests)
            if host.runs:
                return f"run: {tests}"
            like = f"; its imports and calls are run: {tests}" if tests else ""
            return f"source read{like}"

        rows = [(h.name, h.version, h.way_in, checked(h)) for h in HOSTS]
        return [trees.table(("host", "version", "way in", "checked"), rows)]


class Refused(SphinxDirective):
    """What stops with its name."""

    def run(self) -> list[nodes.Node]:
        """The messages themselves, from the functions that give them."""
        from megatron_ext.checkpoint.state import unreadable_sharding
        from megatron_ext.host import arguments

        flags = []
        for suspect in _SUSPECTS:
            args = argparse.Namespace(optimizer_class="CLASS", **suspect)
            for message in arguments.refused_flags(args):
                flag, _, reason = message.partition(" with ")[2].partition(": ")
                flags.append(([trees.code(flag)], reason))
        shardings = [(s, unreadable_sharding(s)) for s in _SHARDINGS]
        forms = [([trees.code(s)], reason) for s, reason in shardings if reason]
        return [
            trees.table(("Megatron's flag", "why it is refused"), flags),
            trees.table(("sharding of the optimizer state", "why it is refused"), forms),
        ]


class Contract(SphinxDirective):
    """The names of Megatron that are leaned on."""

    def run(self) -> list[nodes.Node]:
        """Those that are rebound first."""
        from megatron_ext.host.contract import CONTRACT

        out: list[nodes.Node] = []
        for rebound, title in ((True, "Rebound in memory"), (False, "Called or overridden")):
            rows = [
                (
                    [trees.code(f"{name.module}."), trees.line_break(), trees.code(name.attribute)],
                    name.since,
                    name.reference,
                )
                for name in CONTRACT
                if name.rebound == rebound
            ]
            table = trees.table(("name", "since megatron-core", "where, and what for"), rows)
            out.append(trees.section(title, trees.anchor("contract", title), table))
        return out
