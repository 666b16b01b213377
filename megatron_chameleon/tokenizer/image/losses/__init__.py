"""The losses of the image tokenizer beyond pixels: perceptual and adversarial."""
