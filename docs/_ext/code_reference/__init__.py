"""The reference pages, generated from the package itself.

Each directive reads what the program reads: its argparse parsers, registries, schemas and contract.
What a page says about a flag can then not be another thing than ``--help`` says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from sphinx.ext.autodoc.mock import mock

from . import command_line, compatibility, environment, mathml, optimizers, policies, schemas

if TYPE_CHECKING:
    from sphinx.application import Sphinx


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directives and the renderer of formulas."""
    for name, directive in {
        "reference-flags": command_line.Flags,
        "reference-launcher": command_line.Launcher,
        "reference-commands": command_line.Commands,
        "reference-environment": environment.Environment,
        "reference-presets": policies.Presets,
        "reference-operations": policies.Operations,
        "reference-formulas": policies.Formulas,
        "reference-rules": policies.Rules,
        "reference-optimizers": optimizers.Optimizers,
        "reference-policy-file": schemas.PolicyFile,
        "reference-schemas": schemas.Schemas,
        "reference-versions": compatibility.Versions,
        "reference-hosts": compatibility.Hosts,
        "reference-refused": compatibility.Refused,
        "reference-contract": compatibility.Contract,
    }.items():
        app.add_directive(name, directive)
    app.connect("builder-inited", _import_without_megatron)
    app.add_html_math_renderer("mathml", (mathml.inline, None), (mathml.block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _import_without_megatron(app: Sphinx) -> None:
    """Load the public names while Megatron is a stand-in: autodoc would load them without one."""
    import megatron_ext

    # The stand-in has no version that could be too old.
    version_check = patch("megatron_ext.host.contract.require_megatron")
    with mock(app.config.autodoc_mock_imports), version_check:
        for name in megatron_ext.__all__:
            # autodoc asks again when the stand-in is gone.
            setattr(megatron_ext, name, getattr(megatron_ext, name))
