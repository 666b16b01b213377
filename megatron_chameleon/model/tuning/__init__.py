"""Which parts of a model are trained."""
