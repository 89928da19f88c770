"""Render chat templates, which are programs that come with a checkpoint, in a separate sandboxed process."""

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
