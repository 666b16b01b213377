"""Held-out loss: measured during training, or of a checkpoint."""
