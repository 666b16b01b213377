"""Held-out documents: all of them, each once, as the micro-batches of a forward pass."""
