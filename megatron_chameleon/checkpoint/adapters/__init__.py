"""Adapters as files: those of our checkpoints and those of ``peft``, and their sum with weights."""
