"""Saving, checking, pruning and resuming the state of a training run."""
