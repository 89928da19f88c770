"""Compute products: stored weights, threads, memory, several processes. The mathematics that calls it doesn't depend on how.

| file | what it does |
|---|---|
| weights.py | the forms in which weights are stored, a class each |
| grouped.py | matrices quantised in groups of columns |
| linear.py | y = x Wᵀ for every form of weight and any number of rows |
| layout.py | the layout of dense weights in memory |
| fast.py | attention in tiles, and the tokens of a long prompt shared among threads |
| threads.py | work shared among threads, and BLAS's own threads |
| memory.py | how much memory this process may use |
| ranks/ | one pass by several processes |
"""
