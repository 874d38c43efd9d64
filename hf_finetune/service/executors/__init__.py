"""Executors: one file for each kind of place that jobs run in."""
