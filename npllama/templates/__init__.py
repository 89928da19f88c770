"""Run chat templates, which are programs that came with a checkpoint, in a process of their own that can do nothing else."""

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
