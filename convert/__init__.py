"""Read foreign checkpoint formats and torch models. Installed as npllama_convert; only the command line imports it."""
