"""What runs as a job: slow, and with the machine's own tools. `make test-jobs`."""
