"""Sphinx: `make docs` builds docs/_build/html; every warning is an error, so a link that leads nowhere ends the build."""

project = "hardset"
extensions = ["myst_parser"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "hardset"
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}
myst_heading_anchors = 4  # links to headings, as GitHub makes them
myst_enable_extensions = ["colon_fence"]
