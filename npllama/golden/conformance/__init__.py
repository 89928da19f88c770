"""`npllama conformance`: test vectors for implementations in any language.

| file | what it does |
|---|---|
| numbers.py | inputs that are the same bytes on every machine |
| arrays.py | arrays as bytes |
| models.py, model_files.py | the tiny models, and files of them for loaders |
| config_files.py | files that state a model's constants |
| texts.py | texts and their ids in published tokenizers; recorded_ids.json has them |
| chats.py | conversations in chat formats |
| chat_templates.py | conversations by Jinja templates; recorded_chats.json has the texts |
| operations.py | names, arguments and results of a port's functions |
| cases.py | the cases: inputs that distinguish right from wrong |
| judging.py | compares one array with the expected one |
| measuring.py | tolerances, and which mistakes a case catches |
| suite.py | the suite as files; recorded.json has the measurements |
| grading.py | grades a port's results, from its files or its functions |
| report.py | the verdict as text, JSON or a page |
"""

from .grading import Report, check, checks, run, run_functions
from .suite import export

__all__ = ["Report", "check", "checks", "export", "run", "run_functions"]
