"""What clients send: JSON, messages, images and options, read within limits."""
