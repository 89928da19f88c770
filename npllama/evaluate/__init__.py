"""Evaluate a model: perplexity, known answers, and the time of each operation.

| file | what it does |
|---|---|
| perplexity.py | perplexity on a text, and the divergence of the predictions from another model's |
| known_answers.py | published answers of published models |
| profile.py | the time of each operation |
"""
