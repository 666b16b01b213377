"""The text tokenizer: sentencepiece BPE, a fast encoder, training, Hugging Face's files."""
