"""What the site has beside docs/: a reference page for each module, and the source files that the pages link to.

The pages link to files of the repository, `../npllama/ops.py`, so that the links work where the repository is read. On the site
each such file becomes a page of its own. Both are made while the site is built, so that nothing can go stale.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent.parent
FIRST = ["config", "linear", "ops", "cache", "model"]  # what a reader wants first; the others follow by name
LINK = re.compile(r"(?<=\]\()\.\./(?!docs/)([\w./-]+)(?=\))")
LANGUAGES = {".py": "python", ".c": "c", ".cfg": "ini", ".json": "json", ".md": "markdown"}


def modules() -> list[str]:
    """The dotted names of npllama's modules, the math first."""
    paths = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "npllama").rglob("*.py")]
    names = [".".join(path.parts) for path in paths if not path.name.startswith("__")]
    first = [f"npllama.{name}" for name in FIRST]
    return first + sorted(set(names) - set(first))


def source_page(path: str) -> str:
    """Where a file of the repository is on the site."""
    return f"source/{path}.md"


def linked_files(docs: Path) -> list[str]:
    """The files outside docs/ that its pages link to."""
    found = {path for page in docs.glob("*.md") for path in LINK.findall(page.read_text(encoding="utf-8"))}
    return sorted(path for path in found if (ROOT / path).is_file())


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The reference in the navigation."""
    config.nav.append({"Reference": [{name.removeprefix("npllama."): f"reference/{name}.md"} for name in modules()]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The pages that no file in docs/ stands for."""
    for name in modules():
        content = f"# {name}\n\n::: {name}\n"
        files.append(File.generated(config, f"reference/{name}.md", content=content))
    for path in linked_files(Path(config.docs_dir)):
        language = LANGUAGES.get(Path(path).suffix, "text")
        text = (ROOT / path).read_text(encoding="utf-8")
        content = f"---\nsearch:\n  exclude: true\n---\n# {path}\n\n`````{language}\n{text}\n`````\n"
        files.append(File.generated(config, source_page(path), content=content, inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to files of the repository lead to their pages here."""

    def on_site(link: re.Match) -> str:
        here = posixpath.dirname(page.file.src_uri)
        return (
            posixpath.relpath(source_page(link[1]), here or ".") if files.get_file_from_path(source_page(link[1])) else link[0]
        )

    return markdown if page.file.src_uri.startswith("source/") else LINK.sub(on_site, markdown)
