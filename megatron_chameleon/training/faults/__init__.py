"""What can go wrong during a run: values that are not finite, damaged weights, hangs, signals."""
