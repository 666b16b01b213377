"""Pictures that show faces are drawn more often, as in the paper (section 2.1)."""
