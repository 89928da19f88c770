"""Compute products: stored weights, threads, memory, several processes. The mathematics that calls this knows nothing of it."""
