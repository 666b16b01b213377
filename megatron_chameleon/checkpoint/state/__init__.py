"""Save, check, prune and resume the state of a training run."""
