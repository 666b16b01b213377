"""What vLLM loads in its processes: the model, the rules of images and text, and guidance."""
