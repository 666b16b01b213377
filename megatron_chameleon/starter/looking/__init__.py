"""What is in a user's files, seen within a bounded time."""
