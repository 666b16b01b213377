"""Continuous batching: the rows of running answers, their cache, and the steps that grow them."""
