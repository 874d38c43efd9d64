"""Runs as others start them: from an image, by Slurm, on several nodes. `make test-jobs`."""
