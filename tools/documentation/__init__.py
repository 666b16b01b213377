"""The documentation as a site: ``make docs`` runs ``build.py``."""
