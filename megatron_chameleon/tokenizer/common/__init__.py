"""Shared by both tokenizers: the vocabulary, their files, and the data that they are trained on."""
