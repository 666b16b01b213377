"""What changes over the steps of a run: the learning rate and the batch size."""
