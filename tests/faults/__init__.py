"""Whole runs that are killed, stopped, starved and damaged, and then run again: docs/reliability.md lists them."""
