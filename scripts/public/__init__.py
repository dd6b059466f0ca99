"""Public benchmarks against a server that is already running."""
