"""Build the site: python docs/site/build.py TARGET. Warnings are errors; nothing is fetched while it is built or read.

The pages in docs/ link to files of the repository, [`ops.rms_norm`](../npllama/ops.py), so that the links work where the
repository is read. On the site such a link leads to the function in the reference, or to its line in a page with the file's
source. So Sphinx gets a copy of docs/ with other links, a reference page for each module, and a page for each linked file.
"""

from __future__ import annotations

import ast
import html.parser
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SITE = Path(__file__).resolve().parent
DOCS, ROOT = SITE.parent, SITE.parent.parent
# Sections of the navigation. A page that doesn't exist is left out; one that isn't listed comes under More.
NAVIGATION = {
    "Learn": ["walkthrough", "course/*", "exercises", "reading", "tutorials", "cs336"],
    "Use": ["running", "command-line", "python", "formats", "server", "scale", "machines"],
    "Check a port": ["porting", "finding-a-bug", "capturing", "conformance", "conformance-matrix", "audit"],
    "Figures": ["accuracy", "speed", "mutation"],
}
# The modules that a reader needs first; the others follow by name.
FIRST = ["model", "ops", "config", "cache", "scope", "activations", "engine.linear"]
PUBLIC = ["load", "forward", "complete", "generate", "Conversation"]  # the first of npllama's own names
LINK = re.compile(r"\[([^\[\]]*)\]\(\.\./(?!docs/)([\w./-]+)(?:#L(\d+))?\)")
LANGUAGES = {".py": "python", ".c": "c", ".cfg": "ini", ".json": "json", ".md": "markdown"}


def modules() -> list[str]:
    """Return the dotted names of npllama's modules, the mathematics first."""
    paths = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "npllama").rglob("*.py")]
    names = [".".join(path.parts) for path in paths if not path.name.startswith("__")]
    first = [f"npllama.{name}" for name in FIRST]
    return first + sorted(set(names) - set(first))


def module_of(path: str) -> str:
    """Return npllama/ops.py as npllama.ops."""
    return path.removesuffix(".py").replace("/", ".")


def definitions(path: str) -> dict[str, int]:
    """Return the functions and classes of a Python file with their first lines; `KVCache.update` is among them.

    A function defined inside another is not: no page has a place for it.
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


def label_of(path: str, name: str = "") -> str:
    """Return the label of a source page, or of a function on it."""
    return re.sub(r"[^a-z0-9]+", "-", f"source {path} {name}".lower()).strip("-")


def on_site(text: str, path: str, line: str | None) -> str:
    """Return the link to a file of the repository as one to the function that its text or its line names."""
    words, found = text.strip("`").split("."), definitions(path)
    name = next((".".join(words[i:]) for i in range(len(words)) if ".".join(words[i:]) in found), "")
    if line:
        name = max((start, name) for name, start in [("", 0), *found.items()] if start <= int(line))[1]
    module = module_of(path)
    if module not in modules():
        return f"[{text}](#{label_of(path, name if name in found and '.' not in name else '')})"
    if name.startswith("_"):
        name = ""  # what is private has no place in the reference
    name = name.partition("._")[0]
    return f"{{any}}`{text.strip('`')} <{module}{'.' * bool(name)}{name}>`"


def source_page(path: str) -> str:
    """Return a page with a file's source; in Python each function is a section of its own."""
    language = LANGUAGES.get(Path(path).suffix, "text")
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    starts = {line: name for name, line in definitions(path).items() if "." not in name}
    bounds = [1, *sorted(starts), len(lines) + 1]
    parts = [f"---\norphan: true\nnosearch: true\n---\n({label_of(path)})=\n# {path}\n"]
    for start, end in itertools.pairwise(bounds):
        if start in starts:
            parts.append(f"({label_of(path, starts[start])})=\n## {starts[start]}\n")
        code = "\n".join(lines[start - 1 : end - 1]).strip("\n")
        if code:
            parts.append(f"``````{{code-block}} {language}\n:lineno-start: {start}\n\n{code}\n``````\n")
    return "\n".join(parts)


def reference_page(module: str) -> str:
    """Return the reference of a module."""
    return f"# {module}\n\n```{{eval-rst}}\n.. automodule:: {module}\n   :members:\n   :member-order: bysource\n```\n"


def public_page() -> str:
    """Return the reference of npllama's public names, those that most programs need first."""
    sys.path.insert(0, str(ROOT))
    import npllama

    blocks = []
    for name in [*PUBLIC, *sorted(set(npllama.__all__) - set(PUBLIC), key=str.lower)]:
        kind, members = "autofunction", ""
        if isinstance(value := getattr(npllama, name), type):
            kind = "autoexception" if issubclass(value, Exception) else "autoclass"
            members = "\n   :members:\n   :member-order: bysource"
        blocks.append(f".. {kind}:: npllama.{name}{members}")
    body = "\n\n".join([".. py:module:: npllama", *blocks])
    return f"# npllama\n\nThe names that `import npllama` provides.\n\n```{{eval-rst}}\n{body}\n```\n"


def write_sources(folder: Path) -> None:
    """Write what Sphinx reads: the pages with links of the site, the reference, the linked files and the navigation."""
    shutil.copytree(DOCS, folder, ignore=shutil.ignore_patterns("site", "*.py", "*.toml"))
    for name in ("conf.py", "site.css", "docstrings.py"):
        shutil.copy(SITE / name, folder)
    linked: set[str] = set()

    def of_the_site(link: re.Match) -> str:
        text, path, line = link.groups()
        if not (ROOT / path).is_file():
            raise SystemExit(f"docs: {link[0]} leads to no file")
        if module_of(path) not in modules():
            linked.add(path)
        return on_site(text, path, line)

    for page in folder.glob("*.md"):
        page.write_text(LINK.sub(of_the_site, page.read_text(encoding="utf-8")), encoding="utf-8")
    for path in sorted(linked):
        page = folder / "source" / f"{path}.md"
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(source_page(path), encoding="utf-8")
    reference = folder / "reference"
    reference.mkdir()
    (reference / "npllama.md").write_text(public_page(), encoding="utf-8")
    for name in modules():
        (reference / f"{name}.md").write_text(reference_page(name), encoding="utf-8")
    with (folder / "index.md").open("a", encoding="utf-8") as index:
        index.write(navigation(folder))


def navigation(folder: Path) -> str:
    """Return the tables of contents: the sections, other pages, the reference."""
    pages = {path.relative_to(folder).with_suffix("").as_posix() for path in folder.glob("*.md")} - {"index"}
    sections = {}
    for caption, names in NAVIGATION.items():
        found = [path for name in names for path in sorted(folder.glob(f"{name}.md"))]
        sections[caption] = [path.relative_to(folder).with_suffix("").as_posix() for path in found]
    sections["More"] = sorted(pages.difference(*sections.values()))
    sections["Reference"] = ["reference/npllama", *(f"reference/{name}" for name in modules())]
    blocks = [
        f"```{{toctree}}\n:hidden:\n:caption: {caption}\n\n" + "\n".join(names) for caption, names in sections.items() if names
    ]
    return "".join(f"\n{block}\n```\n" for block in blocks)


class Checker(html.parser.HTMLParser):
    """Find in a page what a reader should not see: backticks outside code, and anything that is loaded from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.within: list[str] = []
        self.problems: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note the elements that hold code, and check what the others load."""
        if tag in ("pre", "code", "script", "style"):
            self.within.append(tag)
        loaded = {"script": "src", "img": "src", "iframe": "src", "link": "href"}.get(tag)
        if loaded and re.match(r"(https?:)?//", dict(attrs).get(loaded) or ""):
            self.problems.append(f"loads {dict(attrs)[loaded]}")

    def handle_endtag(self, tag: str) -> None:
        """Leave an element that holds code."""
        if self.within and tag == self.within[-1]:
            self.within.pop()

    def handle_data(self, data: str) -> None:
        """Check text outside code."""
        if "`" in data and not self.within:
            self.problems.append(f"has a backtick: {data.strip():.80}")


def problems(target: Path) -> list[str]:
    """Return what the pages of a site should not have."""
    found = []
    for path in sorted(target.rglob("*.html")):
        checker = Checker()
        checker.feed(path.read_text(encoding="utf-8"))
        found += [f"{path.relative_to(target)} {problem}" for problem in checker.problems]
    return found


def main(target: str) -> None:
    """Build the site, and check its pages."""
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "docs"
        write_sources(folder)
        command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "-d", f"{work}/doctrees"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}  # the reference is that of this tree
        if status := subprocess.run([*command, str(folder), target], check=False, env=environment).returncode:
            sys.exit(status)
    if found := problems(Path(target)):
        sys.exit("\n".join(found))


if __name__ == "__main__":
    main(sys.argv[1])
