"""What both tokenizers use: the vocabulary, their files, and the documents they learn from."""
