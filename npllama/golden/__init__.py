"""Check ports of Llama: precisions, traces, bundles, known mistakes, comparison, conformance vectors.

| file | what it does |
|---|---|
| precision.py | the pass in float64, float32, and simulated 16 bits and quantised arithmetic |
| trace.py | a pass's activations in memory, or as a trace directory |
| bundle.py | golden bundles: a trace with the noise of rounding |
| mistakes.py | the usual mistakes of ports, each as a change of the correct program |
| compare/ | a port's activations against trusted ones |
| conformance/ | test vectors, and the grades of a port's results |
"""
