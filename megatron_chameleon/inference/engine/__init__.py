"""Decoding: which tokens may come next, how they are drawn, and the engines that do it."""
