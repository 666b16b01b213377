"""Checkpoints of any format into the model that training uses."""
