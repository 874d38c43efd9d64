"""The run folder: paths, status, lock, metrics, checkpoints; no torch."""
