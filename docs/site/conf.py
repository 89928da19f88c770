"""Sphinx's settings. docs/site/build.py copies this file and the pages into a folder of its own."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from docstrings import to_rst

project = "npllama"
html_title = "npllama"
extensions = ["sphinx.ext.autodoc", "sphinx.ext.viewcode", "myst_parser", "sphinx_copybutton"]
exclude_patterns = ["*.py"]
language = "en"
smartquotes = False  # which would make one dash of --force
pygments_style, pygments_dark_style = "tango", "monokai"

html_theme = "furo"  # its fonts are the reader's own, and it loads nothing from elsewhere
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False  # LICENSE names the holders
html_use_index = False
html_domain_indices = False  # the list of modules, which the navigation is too

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
myst_dmath_double_inline = True

# A button copies the commands of a console, without the prompt and without what they print.
copybutton_prompt_text = "$ "
copybutton_copy_empty_lines = False
copybutton_line_continuation_character = "\\"

autodoc_mock_imports = ["starlette", "uvicorn", "mpi4py", "bokeh", "matplotlib"]
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_type_aliases = {"DTypeLike": "DTypeLike", "ArrayLike": "ArrayLike"}  # not the unions that they stand for
python_maximum_signature_line_length = 80
python_use_unqualified_type_names = True
add_module_names = False
suppress_warnings = ["ref.python"]  # a type in a signature whose short name two modules have
toc_object_entries_show_parents = "hide"


def convert_docstring(app: Any, kind: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Make reStructuredText of a docstring, in place."""
    lines[:] = to_rst("\n".join(lines)).splitlines()


def mathml(tex: str, display: str) -> str:
    """Typeset a formula as MathML, which browsers draw without a script."""
    from latex2mathml.converter import convert

    return convert(tex, display=display)


def inline_math(self: Any, node: Any) -> None:
    """Write a formula in a line."""
    from docutils import nodes

    self.body.append(mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def block_math(self: Any, node: Any) -> None:
    """Write a formula of its own; a wide one scrolls."""
    from docutils import nodes

    self.body.append(f'<div class="math-block">{mathml(node.astext(), "block")}</div>')
    raise nodes.SkipNode


def break_names(app: Any, page: str, template: str, context: dict[str, Any], doctree: object) -> None:
    """Let long names in tables break at their underscores and dots, and nowhere else; an option and 1e-05 nowhere."""

    def breakable(match: re.Match) -> str:
        cell = re.sub(r"[\d.]+e-\d+(?![^<]*>)", r'<span class="number">\g<0></span>', match[0])
        return re.sub(r"<code[^>]*>.*?</code>", lambda code: re.sub(r"([_.])(?=\w)(?![^<]*>)", r"\1<wbr>", code[0]), cell)

    if body := context.get("body"):
        body = re.sub(r'<span class="pre">(?=-)', '<span class="pre option">', body)
        context["body"] = re.sub(r"<td>.*?</td>", breakable, body, flags=re.S)


def setup(app: Any) -> None:
    """Connect the functions above to Sphinx."""
    app.connect("autodoc-process-docstring", convert_docstring)
    app.connect("html-page-context", break_names)
    app.add_html_math_renderer("mathml", (inline_math, None), (block_math, None))


html_math_renderer = "mathml"
