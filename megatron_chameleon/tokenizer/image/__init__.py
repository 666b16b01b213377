"""The image tokenizer: VQGAN, pixels, batches and training."""
