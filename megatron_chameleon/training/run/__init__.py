"""What belongs to a run besides the model: inputs, run folder, lock, console and trackers."""
