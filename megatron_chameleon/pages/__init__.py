"""Building blocks of self-contained HTML pages: one look for all pages of the project.

A page needs no script and loads nothing. It is readable on a phone, in light and dark, and printed.
Everything that comes from a file is escaped by the functions that take it.
"""
