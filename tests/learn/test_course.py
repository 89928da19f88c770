"""docs/course/: the notebooks run, they are what docs/make_course.py makes, and their exercises can be failed and passed."""

from __future__ import annotations

import re
from types import ModuleType

import numpy as np
import pytest

from npllama.learn import course, grading
from npllama.learn.exercises import EXERCISES, find

from system import ROOT, script

nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed: pip install '.[notebook]'")

NAMES = ["1-tokens", "2-attention", "3-rope", "4-cache", "5-precision", "6-conversation"]
FOLDER = ROOT / "docs" / "course"


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    return script("docs/make_course.py")


@pytest.fixture(scope="module")
def stored():
    return {name: nbformat.read(FOLDER / f"{name}.ipynb", as_version=4) for name in NAMES}


def exercises(maker, name: str) -> list[tuple[str, str]]:
    """Return the code of each exercise's cell, and of the answer that follows it."""
    cells = [cell for cell in maker.cells(FOLDER / f"{name}.py") if cell[0] in ("exercise", "answer")]
    assert [kind for kind, _ in cells] == ["exercise", "answer"] * (len(cells) // 2)
    codes = [body for _, body in cells]
    return list(zip(codes[::2], codes[1::2], strict=True))


def test_there_are_six_of_an_hour_each(maker):
    assert [source.stem for source in maker.sources()] == NAMES
    for source in maker.sources():
        assert 25 <= len(list(maker.cells(source))) <= 75, source.stem


@pytest.mark.parametrize("name", NAMES)
def test_the_stored_notebook_is_what_the_script_makes(maker, stored, name):
    made = maker.make_notebook(FOLDER / f"{name}.py")
    nbformat.validate(stored[name])
    for ours, theirs in zip(made.cells, stored[name].cells, strict=True):
        assert (ours.id, ours.cell_type, ours.source) == (theirs.id, theirs.cell_type, theirs.source), "run docs/make_course.py"


@pytest.mark.parametrize("name", NAMES)
def test_the_page_is_the_notebook(maker, stored, name):
    page, pictures = maker.to_markdown(name, stored[name])
    assert (FOLDER / f"{name}.md").read_text(encoding="utf-8") == page, "run docs/make_course.py"
    assert {file.name: file.read_bytes() for file in maker.PICTURES.glob(f"{name}-*.png")} == pictures
    assert all(len(content) < 60_000 for content in pictures.values())
    texts = re.findall(r"^!\[(.*)\]\(pictures/", page, re.MULTILINE)
    assert len(set(texts)) == len(pictures), "each picture has an alternative text of its own"


def shown(cell) -> list[str]:
    """Return what a cell shows: texts as they are, of a picture only that it is one; of a cell of source code nothing."""
    if cell.cell_type == "markdown" or cell.source.startswith("source("):  # the code of npllama changes, and its meaning not
        return []
    found = []
    for output in cell.outputs:
        data = output.get("data", {})
        assert output.output_type in ("stream", "execute_result", "display_data"), output
        assert output.get("name") != "stderr", output.text
        found.append(
            "picture" if "image/png" in data else output.get("text") or data.get("text/markdown") or data["text/plain"]
        )
    return found


@pytest.mark.slow
def test_the_notebooks_run_and_show_what_is_stored(maker, stored):
    for package in ("nbclient", "ipykernel", "matplotlib"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install '.[notebook]'")
    made = {name: maker.make_notebook(FOLDER / f"{name}.py") for name in NAMES}
    maker.execute(list(made.values()))  # raises where a cell does
    for name in NAMES:
        for ours, theirs in zip(made[name].cells, stored[name].cells, strict=True):
            assert shown(ours) == shown(theirs), f"{name}: {theirs.source}: run docs/make_course.py"


def test_the_course_uses_every_exercise_once(maker):
    used = [re.search(r"^grade\((\w+)\)$", cell, re.MULTILINE)[1] for name in NAMES for cell, _ in exercises(maker, name)]
    assert sorted(used) == sorted(exercise.name for exercise in EXERCISES)


@pytest.mark.parametrize("name", NAMES)
def test_an_exercise_fails_before_the_answer_and_passes_with_it(maker, tmp_path, capsys, name):
    """Check it in the notebook's own cell, and with the files that the command checks."""
    grading.start(tmp_path)
    for empty, answer in exercises(maker, name):
        exec(empty, {"np": np, "grade": grading.grade})
        assert capsys.readouterr().out.split(maxsplit=1)[1] == "not done yet\n"
        function = re.search(r"^grade\((\w+)\)$", empty, re.MULTILINE)[1]
        assert grading.check(tmp_path, find(function)).line == "not done yet"

        exec(f"{answer}\n\ngrade({function})", {"np": np, "grade": grading.grade})
        assert capsys.readouterr().out.startswith(f"{function:<17} ok; npllama's own is ")
        (tmp_path / grading.file_name(find(function))).write_text(f"import numpy as np\n\n{answer}\n", encoding="utf-8")
        outcome = grading.check(tmp_path, find(function))
        assert outcome.passed, outcome


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_folded(maker, stored, name):
    """Check that no answer is in a visible cell, and that each is closed until somebody opens it."""
    plain = [cell.source for cell in stored[name].cells if "<details>" not in cell.source]
    for _, answer in exercises(maker, name):
        assert not any(answer in source for source in plain)
    for cell in stored[name].cells:
        if "<details" in cell.source:
            assert cell.source.startswith("<details><summary>Answer</summary>\n\n<p")  # a paragraph, or code
            assert cell.source.endswith(">\n\n</details>")


def test_a_grade_names_the_mistake_and_the_line(capsys):
    def softmax(x):
        return np.exp(x) / np.exp(x).sum(-1, keepdims=True)

    course.grade(softmax)
    assert "hint: exp overflows" in capsys.readouterr().out

    def draw(p, u):
        return 1 / 0

    course.grade(draw)
    assert re.match(r"draw +ZeroDivisionError in line \d+: division by zero\n", capsys.readouterr().out)


def test_the_source_that_is_shown_has_no_docstring():
    shown = course.code_of(course.code_of)
    assert '"""' not in shown
    assert shown.startswith("def code_of(function: Callable) -> str:\n    code = ")
    assert shown.endswith('return "\\n".join(lines)')
    assert repr(course.source(course.code_of)) == f"```python\n{shown}\n```"


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(maker, name):
    for kind, body in maker.cells(FOLDER / f"{name}.py"):
        if kind == "text":
            for target in re.findall(r"\]\(([^)\s]+)\)", body):
                assert (FOLDER / target).resolve().exists(), target
