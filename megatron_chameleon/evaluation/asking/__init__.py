"""Asks a model: answers, likelihoods, and the files that store them."""
