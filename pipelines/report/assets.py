"""The files of the template folder, and how data and scripts are put into a page that fetches nothing."""

import base64
import gzip
import importlib.resources
import importlib.util
import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

TEMPLATE = "template"


def environment() -> Environment:
    """Jinja's environment of our templates; everything that is put into a page is escaped unless marked as safe."""
    loader = PackageLoader(__package__, TEMPLATE)
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def json_block(data: dict[str, Any]) -> str:
    """JSON that can stand in a script element whatever strings it holds."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def packed(script: str) -> str:
    """A script as base64 of its gzip, the same bytes each time; the page unpacks it for the first chart."""
    return base64.b64encode(gzip.compress(script.encode(), mtime=0)).decode()


def asset(name: str) -> str:
    """The text of a file of the template folder."""
    return importlib.resources.files(__package__).joinpath(TEMPLATE, name).read_text(encoding="utf-8")


def plotly_script() -> str:
    """Plotly's JavaScript, read from its package, whose Python side takes seconds to import."""
    package = importlib.util.find_spec("plotly").submodule_search_locations[0]
    return Path(package, "package_data", "plotly.min.js").read_text(encoding="utf-8")
