"""Render chat templates, which are programs that come with a checkpoint, in a separate sandboxed process.

| file | what it does |
|---|---|
| rendering.py | finds a checkpoint's templates and sends them to the other process |
| child.py | the program of that process, which renders with Jinja |
"""

from .rendering import (
    FILE,
    Renderer,
    TemplateError,
    file_of,
    missing_package,
    named_templates,
    read_templates,
    render,
    template_variables,
)

__all__ = [
    "FILE",
    "Renderer",
    "TemplateError",
    "file_of",
    "missing_package",
    "named_templates",
    "read_templates",
    "render",
    "template_variables",
]
