"""Answers: the text and the images that token ids stand for."""
