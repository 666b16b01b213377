"""Pages about runs: a report of one, and a comparison of several."""
