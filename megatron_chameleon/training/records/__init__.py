"""What a run writes down about itself, and the words that it sends to whoever wants to know."""
