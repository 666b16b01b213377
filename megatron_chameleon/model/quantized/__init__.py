"""Frozen weights in fewer bits than those of training."""
