"""The loss on pairs of answers."""
