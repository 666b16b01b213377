"""What the tokenizers are trained on: texts and images, from documents as ``preprocess`` reads
them, and from plain files."""
