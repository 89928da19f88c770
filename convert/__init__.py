"""The frontier: everything that knows a foreign format or torch. Installed as npllama_convert; npllama never imports it."""
