"""For those who port: precisions, traces, bundles, mistakes, comparison."""
