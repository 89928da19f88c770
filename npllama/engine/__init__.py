"""How products are computed: stored weights, threads, memory. It may be clever; the mathematics that calls it doesn't know."""
