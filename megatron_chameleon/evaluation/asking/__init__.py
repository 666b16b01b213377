"""Asking a model: answers, likelihoods, and the files that keep them."""
