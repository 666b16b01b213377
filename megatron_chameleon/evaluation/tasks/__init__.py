"""Benchmarks of the paper and of the user: their items, metrics and results."""
