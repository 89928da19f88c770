"""Compute products: stored weights, threads, memory, several processes. The mathematics that calls this knows nothing of it.

| file | what it does |
|---|---|
| weights.py | the forms in which weights are stored, a class each |
| grouped.py | matrices quantised in groups of columns |
| linear.py | y = x Wᵀ for every form of weight and any number of rows |
| layout.py | where dense weights lie in memory |
| fast.py | attention in tiles, and the tokens of a long prompt shared among threads |
| threads.py | work shared among threads, and BLAS's own threads |
| memory.py | how much memory this process may use |
| ranks/ | one pass by several processes |
"""
