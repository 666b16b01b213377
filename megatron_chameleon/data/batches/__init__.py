"""From a sample's index to its tensors, labels and masks."""
