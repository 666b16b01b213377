"""What the training of an image tokenizer leaves to look at: metrics, measurements and a page."""
