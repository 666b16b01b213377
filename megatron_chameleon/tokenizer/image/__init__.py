"""The image tokenizer: its network, its pixels and its codes."""
