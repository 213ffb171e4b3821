"""Sphinx configuration: ``make docs``."""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

from sphinx.application import Sphinx
from sphinx.ext.autodoc.mock import mock

HERE = Path(__file__).resolve().parent
# The checkout's package, whatever is installed.
sys.path[:0] = [str(HERE.parent), str(HERE / "_ext")]

import mathml  # noqa: E402

from megatron_ext.version import __version__  # noqa: E402

project = "megatron_ext"
author = "the authors of megatron_ext"
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "_ext"]
# "--flag" is no dash.
smartquotes = False
# Docstrings name things in single backquotes.
default_role = "literal"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

# Megatron needs a GPU, or `megatron_ext.cpu`, to be imported; its signatures are not ours to show.
autodoc_mock_imports = ["megatron"]
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# What other packages document; there is no network in a build.
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|megatron|collections|typing|argparse|pathlib|os|dataclasses|enum)(\..*)?"),
    # Types of annotations that no page is about.
    (r"py:class", r"megatron_ext\._?\w+\..*|(dict|tuple|list)\[.*"),
]

html_theme = "furo"
html_title = f"megatron_ext {release}"
html_copy_source = False
html_show_sourcelink = False
html_show_copyright = False
# Formulas as MathML: nothing is fetched when a page is read.
html_math_renderer = "mathml"


def setup(app: Sphinx) -> dict[str, Any]:
    """Register what this site needs of its own."""
    # docs/requirements.txt, without torch, is enough to build all pages but the docstrings.
    if find_spec("torch") is None:
        app.connect("source-read", _leave_docstrings_out)
    else:
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


def _leave_docstrings_out(app: Sphinx, page: str, source: list[str]) -> None:
    """Keep the table of names on the page of autodoc, which would import them."""
    if page == "reference/api":
        source[0] = source[0].partition("\n## ")[0]
