"""What the weights that a run begins with give to its pairs of answers."""
