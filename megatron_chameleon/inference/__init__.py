"""Generation: what may come next, how it is drawn, and a session that does both."""
