"""Loose pictures and texts, which no file of documents names: found, and turned into documents."""
