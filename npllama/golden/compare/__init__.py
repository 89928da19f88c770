"""`npllama compare`: compare a port's activations with trusted ones, and name the first operation that is wrong.

| file | what it does |
|---|---|
| names.py | the activations' names, order and axes |
| metrics.py | distances between two arrays |
| inputs.py | readers of a port's files, in any container |
| known_maps.py | names and layouts of known programs |
| maps.py | reads a map, and arranges a candidate's arrays by it |
| noise.py | the noise floor, the error that rounding alone causes, and the limits |
| judging.py | compares two arrays of one activation |
| angles.py | finds the angles of a candidate's RoPE and their constants |
| hints.py | known mistakes, tried on the candidate's numbers |
| comparison.py | compare() itself |
| text.py, html.py, report.py | the output as text, as a page and as JSON |

`compare("reference", "mine", names="hf").verdict` is the result in one sentence.
"""

from .comparison import Comparison, Row, compare

__all__ = ["Comparison", "Row", "compare"]
