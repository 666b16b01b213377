"""The run folder: its lock, metrics, console lines, trackers and skipped steps."""
