"""What of a config cannot work, each problem with its numbers and its remedy."""
