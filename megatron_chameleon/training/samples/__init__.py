"""Text and images that the model writes while it is trained."""
