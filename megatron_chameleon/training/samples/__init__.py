"""Text and images that the model writes during training."""
