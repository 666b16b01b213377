"""What each step is measured by: activations and logits, divergence, slow ranks, traces."""
