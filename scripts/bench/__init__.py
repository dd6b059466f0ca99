"""Benchmarks: servers side by side, and kernels against memory bandwidth."""
