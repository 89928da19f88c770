"""Audit released implementations of Llama: install each, run the conformance suite and a trace, and report what differs."""
