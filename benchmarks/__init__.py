"""What npllama costs, measured: `python -m benchmarks`."""
