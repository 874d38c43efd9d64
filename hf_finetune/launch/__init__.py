"""The entry point of jobs, and the check of their health."""
