"""Make notebooks, run them, and format them as Markdown: for make_walkthrough.py and make_course.py."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import nbformat

ENDINGS = {"image/png": ".png", "image/svg+xml": ".svg"}  # of the pictures' files


def new(cells: Iterable[nbformat.NotebookNode]) -> nbformat.NotebookNode:
    """Make a notebook of these cells, without outputs."""
    notebook = nbformat.v4.new_notebook(cells=list(cells))
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook.metadata["language_info"] = {"name": "python"}
    for i, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{i}"
    return notebook


def run(notebook: nbformat.NotebookNode, folder: Path, seconds: int) -> None:
    """Run a notebook in a folder, each cell for at most `seconds`, and keep its outputs. A cell that fails raises."""
    from nbclient import NotebookClient

    NotebookClient(notebook, timeout=seconds, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()
    notebook.metadata["language_info"] = {"name": "python"}  # without the version
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # the times


def to_markdown(script: str, notebook: nbformat.NotebookNode, pictures: str, alt: str) -> tuple[str, dict[str, bytes]]:
    """Format a notebook as a page, and return it with its pictures by name.

    script    what the page's first line names as its source
    pictures  the path of a picture on the page, before `-1.png` and the like
    alt       the text in place of a picture, with {heading} for the heading above it, and {title} for its own
    """
    parts, files, heading = [f"<!-- made by {script}: edit that -->"], {}, ""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            heading = ([heading] + [line.lstrip("# ") for line in cell.source.splitlines() if line.startswith("#")])[-1]
            continue
        parts.append(f"```python\n{cell.source}\n```")
        for output in cell.outputs:
            data: dict[str, Any] = output.get("data", {})
            kind = next((kind for kind in ENDINGS if kind in data), None)
            if kind:
                path = f"{pictures}-{len(files) + 1}{ENDINGS[kind]}"
                files[Path(path).name] = base64.b64decode(data[kind]) if kind == "image/png" else data[kind].encode()
                text = alt.format(heading=heading, title=title(cell.source)).removesuffix(": ")
                parts.append(f"![{text}]({path})")
            elif "text/markdown" in data:
                parts.append(data["text/markdown"].strip())
            else:
                parts.append(f"```text\n{(output.get('text') or data['text/plain']).rstrip()}\n```")
    return "\n\n".join(parts) + "\n", files


def title(code: str) -> str:
    """Return the title that a cell gives its picture, if that is a plain string."""
    found = re.search(r"""title(?:=|\()(["'])(.*?)\1[,)\n]""", code)
    return found[2] if found else ""


def replace_pictures(folder: Path, old: str, pictures: dict[str, bytes]) -> None:
    """Write a page's pictures, after removing those of an earlier page, which match the pattern `old`."""
    folder.mkdir(exist_ok=True)
    for file in folder.glob(old):
        file.unlink()
    for name, content in pictures.items():
        (folder / name).write_bytes(content)
