"""Upload adapters to the Hub: the files that may leave, and a process that sends them in time or not at all."""
