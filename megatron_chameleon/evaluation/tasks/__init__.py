"""Benchmarks: the paper's and one's own, their items, metrics and results."""
