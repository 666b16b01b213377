"""Decoders of what input files are made of. They know nothing of records, only limits."""
