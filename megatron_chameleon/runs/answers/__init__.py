"""What a model wrote during and after its training: samples, and the answers of its checks."""
