"""A conversation in a terminal: lines in, text and pictures out."""
