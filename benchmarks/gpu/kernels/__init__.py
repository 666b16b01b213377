"""Parts that measure single kernels: the machine's limits, losses, QK-norm with RoPE."""
