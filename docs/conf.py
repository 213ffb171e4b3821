"""Sphinx configuration: ``make docs``."""

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
# The checkout's package, whatever is installed.
sys.path[:0] = [str(HERE.parent), str(HERE / "_ext")]
# The width argparse breaks a usage line at.
os.environ["COLUMNS"] = "90"

from megatron_ext.version import __version__  # noqa: E402

project = "megatron_ext"
author = "the authors of megatron_ext"
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "code_reference"]
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
