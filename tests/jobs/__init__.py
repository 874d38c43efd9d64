"""What runs a recipe as a job: the image, Kubernetes, Slurm, several nodes. `make test-jobs`."""
