"""Evaluate a model: perplexity, known answers, and a profile of its time.

| file | what it does |
|---|---|
| perplexity.py | how well a model predicts a text, and how far its predictions are from another model's |
| known_answers.py | published answers of published models |
| profile.py | the time of each operation |
"""
