"""The text tokenizer: sentencepiece BPE, a fast encoder for bulk text, training, model files."""
