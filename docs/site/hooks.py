"""What the site has beside docs/: a reference page for each module, and the source files that the pages link to.

The pages link to files of the repository, [`ops.rms_norm`](../npllama/ops.py), so that the links work where the repository is
read. On the site such a link leads to the function in the reference, or to its line in a page with the file's source. All is
made while the site is built, so that nothing can go stale.
"""

from __future__ import annotations

import ast
import itertools
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent.parent
# What a reader wants first; the others follow by name.
FIRST = ["model", "ops", "config", "cache", "scope", "activations", "engine.linear"]
LINK = re.compile(r"\[([^\[\]]*)\]\(\.\./(?!docs/)([\w./-]+)(?:#L(\d+))?\)")
LANGUAGES = {".py": "python", ".c": "c", ".cfg": "ini", ".json": "json", ".md": "markdown"}


def modules() -> list[str]:
    """The dotted names of npllama's modules, the math first."""
    paths = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "npllama").rglob("*.py")]
    names = [".".join(path.parts) for path in paths if not path.name.startswith("__")]
    first = [f"npllama.{name}" for name in FIRST]
    return first + sorted(set(names) - set(first))


def linked_files(docs: Path) -> list[str]:
    """The files outside docs/ that its pages link to, and that the reference has not."""
    found = {path for page in docs.glob("*.md") for _, path, _ in LINK.findall(page.read_text(encoding="utf-8"))}
    return sorted(path for path in found if (ROOT / path).is_file() and module_of(path) not in modules())


def module_of(path: str) -> str:
    """npllama/ops.py as npllama.ops."""
    return path.removesuffix(".py").replace("/", ".")


def definitions(path: str) -> dict[str, int]:
    """The functions and classes of a Python file with their first lines; `KVCache.update` is there too.

    What is defined inside a function is not: no page has a place for it.
    """
    found = {}

    def visit(node: ast.AST, above: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                found[above + child.name] = min([child.lineno, *(decorator.lineno for decorator in child.decorator_list)])
                if isinstance(child, ast.ClassDef):
                    visit(child, f"{above}{child.name}.")

    if path.endswith(".py"):
        visit(ast.parse((ROOT / path).read_text(encoding="utf-8")), "")
    return found


def target_of(text: str, path: str, line: str | None) -> str:
    """Where a link to a file of the repository leads on the site: to the function that its text or its line names."""
    words, found = text.strip("`").split("."), definitions(path)
    name = next((".".join(words[i:]) for i in range(len(words)) if ".".join(words[i:]) in found), None)
    if line:
        name = max((start, name) for name, start in [("", 0), *found.items()] if start <= int(line))[1]
        name = name.partition("._")[0] if not name.startswith("_") else None  # what is private has no place in the reference
    module = module_of(path)
    if module in modules():
        return f"reference/{module}.md" + (f"#{module}.{name}" if name else "")
    return f"source/{path}.md" + (f"#{name}" if name else "")


def source_page(path: str) -> str:
    """A file's source; in Python each function is a section of its own."""
    language = LANGUAGES.get(Path(path).suffix, "text")
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    starts = {line: name for name, line in definitions(path).items() if "." not in name}
    bounds = [1, *sorted(starts), len(lines) + 1]
    parts = [f"---\nsearch:\n  exclude: true\n---\n# {path}\n"]
    for start, end in itertools.pairwise(bounds):
        if start in starts:
            parts.append(f"## {starts[start]} {{ #{starts[start]} }}\n")
        code = "\n".join(lines[start - 1 : end - 1]).strip("\n")
        parts.append(f'`````{{ .{language} linenums="{start}" }}\n{code}\n`````\n')
    return "\n".join(parts)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The reference in the navigation."""
    config.nav.append({"Reference": [{name.removeprefix("npllama."): f"reference/{name}.md"} for name in modules()]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The pages that no file in docs/ stands for."""
    for name in modules():
        files.append(File.generated(config, f"reference/{name}.md", content=f"# {name}\n\n::: {name}\n"))
    for path in linked_files(Path(config.docs_dir)):
        content, inclusion = source_page(path), InclusionLevel.NOT_IN_NAV
        files.append(File.generated(config, f"source/{path}.md", content=content, inclusion=inclusion))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to files of the repository lead to their pages here."""
    if posixpath.dirname(page.file.src_uri):
        return markdown

    def on_site(link: re.Match) -> str:
        target = target_of(*link.groups()) if (ROOT / link[2]).is_file() else f"../{link[2]}"
        return f"[{link[1]}]({target})"

    return LINK.sub(on_site, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """In tables, long names break at their underscores and dots, and nowhere else; a function's source is not searched."""

    def breakable(cell: re.Match) -> str:
        return re.sub(r"<code>[^<]*</code>", lambda code: re.sub(r"([_.])(?=\w)", r"\1<wbr>", code[0]), cell[0])

    html = html.replace('<details class="mkdocstrings-source">', '<details class="mkdocstrings-source" data-search-exclude>')
    return re.sub(r"<td>.*?</td>", breakable, html)
