"""Make the course: from each docs/course/*.py its notebook with outputs, its page and its pictures.

    pip install '.[notebook]' && python docs/make_course.py [NAME ...]

The sources are in jupytext's percent format. A cell begins with one of these lines:

    # %% [markdown]                      text, each line behind `# `
    # %%                                 code
    # %% tags=["exercise"]               code: the empty function and the call that grades it
    # %% tags=["answer"]                 code that no kernel runs: becomes text that is folded until a reader opens it
    # %% [markdown] tags=["answer"]      text that is folded

Numbers are printed with few digits, so that every machine makes the same outputs.
"""

from __future__ import annotations

import base64
import html
import io
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import nbformat

import notebooks

FOLDER = Path(__file__).resolve().parent / "course"
PICTURES = FOLDER / "pictures"
SECONDS = 120  # the longest a cell may take


def sources() -> list[Path]:
    """Return the sources in the order of the course."""
    return sorted(FOLDER.glob("*.py"))


def cells(source: Path) -> Iterator[tuple[str, str]]:
    """Read a source: the kind of each cell (text, code, exercise, answer, folded text) and what it holds."""
    for part in re.split(r"^# %%", source.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        marks, _, body = part.partition("\n")
        is_text, is_answer = "[markdown]" in marks, '"answer"' in marks
        body = body.strip()
        if is_text:
            body = re.sub(r"^# ?", "", body, flags=re.MULTILINE)
            yield "folded text" if is_answer else "text", body
        else:
            yield "answer" if is_answer else "exercise" if '"exercise"' in marks else "code", body


def folded(summary: str, content: str) -> str:
    """Return HTML that is closed until it is clicked, which Jupyter, forges and the site show alike.

    The empty line ends Markdown's block of HTML, so that <pre> begins one of its own, which may have empty lines.
    """
    return f"<details><summary>{summary}</summary>\n\n{content}\n\n</details>"


def paragraphs(text: str) -> str:
    """Format text with `code` in it as HTML: Markdown is not read inside of HTML everywhere."""
    parts = re.split(r"\n\s*\n", html.escape(text, quote=False))
    return "\n".join("<p>" + re.sub(r"`([^`]+)`", r"<code>\1</code>", part) + "</p>" for part in parts)


def make_notebook(source: Path) -> nbformat.NotebookNode:
    """Make a notebook without outputs."""
    made = []
    for kind, body in cells(source):
        if kind in ("code", "exercise"):
            made.append(nbformat.v4.new_code_cell(body))
        elif kind == "answer":
            code = f'<pre><code class="language-python">{html.escape(body, quote=False)}</code></pre>'
            made.append(nbformat.v4.new_markdown_cell(folded("Answer", code)))
        else:
            made.append(nbformat.v4.new_markdown_cell(body if kind == "text" else folded("Answer", paragraphs(body))))
    return notebooks.new(made)


def execute(chosen: Sequence[nbformat.NotebookNode]) -> None:
    """Run the notebooks, each in an empty namespace of one kernel, and keep their outputs. A cell that fails raises."""
    together = nbformat.v4.new_notebook()  # starting a kernel takes longer than most notebooks
    for notebook in chosen:
        together.cells += [nbformat.v4.new_code_cell("%reset -f"), *notebook.cells]
    notebooks.run(together, FOLDER, SECONDS)
    for notebook in chosen:
        _tidy(notebook)


def _tidy(notebook: nbformat.NotebookNode) -> None:
    """Leave out of a notebook what differs from run to run."""
    for number, cell in enumerate((cell for cell in notebook.cells if cell.cell_type == "code"), start=1):
        cell.execution_count = number
        printed = [output for output in cell.outputs if output.get("name") == "stdout"]
        for output in printed[1:]:  # what a cell prints comes in as many parts as the time allows
            printed[0]["text"] += output["text"]
            cell.outputs.remove(output)
        for output in cell.outputs:
            if "execution_count" in output:
                output["execution_count"] = number
            data: Any = output.get("data", {})
            if "image/png" in data:
                output["data"] = {"image/png": smaller(data["image/png"])}
            elif "text/markdown" in data:
                output["data"] = {"text/markdown": data["text/markdown"]}


def smaller(png: str) -> str:
    """Reduce a picture to 256 colours, base64 before and after: a fifth of the bytes, and no visible difference."""
    from PIL import Image

    image, out = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB"), io.BytesIO()
    image.quantize(256, Image.Quantize.MAXCOVERAGE).save(out, "png", optimize=True)
    return base64.b64encode(out.getvalue()).decode()


def to_markdown(name: str, notebook: nbformat.NotebookNode) -> tuple[str, dict[str, bytes]]:
    """Format a notebook as Markdown for the site, and return it with its pictures by name."""
    script = f"docs/make_course.py from {name}.py"
    page, pictures = notebooks.to_markdown(script, notebook, f"{PICTURES.name}/{name}", "{heading}: {title}")
    return re.sub(r"\]\((\d-[\w-]+)\.ipynb\)", r"](\1.md)", page), pictures


def main(names: Sequence[str]) -> None:
    """Run the notebooks of these names, or all, and write their files."""
    chosen = [source for source in sources() if not names or source.stem in names]
    made = [make_notebook(source) for source in chosen]
    execute(made)
    for source, notebook in zip(chosen, made, strict=True):
        nbformat.write(notebook, source.with_suffix(".ipynb"))
        page, pictures = to_markdown(source.stem, notebook)
        source.with_suffix(".md").write_text(page, encoding="utf-8")
        notebooks.replace_pictures(PICTURES, f"{source.stem}-*.png", pictures)
        print(f"{source.stem}: {len(notebook.cells)} cells, {len(pictures)} pictures", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
