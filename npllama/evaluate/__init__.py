"""Evaluate a model: perplexity, known answers, and a profile of its time."""
