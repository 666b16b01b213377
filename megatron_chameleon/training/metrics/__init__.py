"""What is measured of a step: activations and logits, divergence, slow ranks, traces."""
