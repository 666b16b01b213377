"""Processes that work on blocks of records and return their results in order."""
