"""Documents in, batches out: documents -> token ids -> .bin/.idx -> windows -> batches."""
