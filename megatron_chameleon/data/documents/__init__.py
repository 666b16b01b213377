"""What a document is, and how records become documents."""
