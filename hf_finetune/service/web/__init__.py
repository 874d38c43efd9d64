"""The web page of the service: server-rendered frames, and scripts that call the same API as everybody else."""
