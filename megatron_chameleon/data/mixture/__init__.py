"""Which sample holds which documents: a pure function of config, seed and sample index."""
