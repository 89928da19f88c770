"""`npllama compare`: hold a port's activations against trusted ones, and name the first operation that is wrong.

| file | what it does |
|---|---|
| names.py | the activations' names, order and axes |
| metrics.py | distances between two arrays |
| inputs.py | reads what a port wrote, in whatever container |
| maps.py | other programs' names and layouts |
| noise.py | how far rounding alone goes, and how far is too far |
| judging.py | two arrays of one activation, held against each other |
| angles.py | what angles a candidate's RoPE rotated by, and from which constants |
| hints.py | known mistakes, tried on the candidate's numbers |
| comparison.py | compare() itself |
| text.py, html.py, report.py | what the terminal shows, the page, JSON |

`compare("reference", "mine", names="hf").verdict` is the answer in one sentence.
"""

from .comparison import Comparison, Row, compare

__all__ = ["Comparison", "Row", "compare"]
