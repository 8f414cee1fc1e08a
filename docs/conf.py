"""Sphinx's configuration: `make docs` builds strictly, warnings are errors."""

from __future__ import annotations

project = "hf-equissl"
author = "The hf-equissl authors"
copyright = author
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "hf-equissl"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_google_docstring = True
napoleon_use_ivar = True
# Docstrings name classes of other packages in prose; only what autodoc itself writes must resolve.
nitpicky = False
suppress_warnings = ["config.cache"]
