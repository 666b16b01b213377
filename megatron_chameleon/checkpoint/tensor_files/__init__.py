"""Tensors on disk: safetensors, torch's ``.pth`` and raw bytes. Nothing here knows about models."""
