"""Parts that measure whole models: parity, training steps, generation and images."""
