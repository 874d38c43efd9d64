"""The image, Kubernetes, Slurm, several nodes: what runs a recipe as a job."""
