"""Training of the image tokenizer: images, losses, steps, and the state of an unfinished run."""
