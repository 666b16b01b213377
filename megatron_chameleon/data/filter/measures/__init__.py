"""Measures documents for the filters that ``options.py`` lists, and keeps the values in a table."""
