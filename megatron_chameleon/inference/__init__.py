"""Generation: which tokens may come next, how one is drawn, and a session that does both."""
