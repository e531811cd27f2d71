"""Settings of the documentation site: `sphinx-build -W docs docs/_build` builds it from these pages and docstrings."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # the kernels' modules are imported on machines without a GPU too

import varkern

project = "varkern"
author = "the varkern authors"
copyright = author
version = release = varkern.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.intersphinx"]
exclude_patterns = ["_build"]
intersphinx_mapping = {}

html_theme = "furo"
html_title = "varkern"
html_copy_source = False

myst_heading_anchors = 3  # links such as choose.md#how-to-pick

autodoc_typehints = "none"  # the docstrings give types, shapes and ranges in words
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
suppress_warnings = [
    "myst.xref_missing"
]  # links out of docs/ into the repository; tests/test_docs.py checks every link
