"""Measure npllama's speed and memory: `python -m benchmarks`."""
