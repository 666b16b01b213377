"""``chameleon preprocess``: documents become token files, in worker processes or over MPI."""
