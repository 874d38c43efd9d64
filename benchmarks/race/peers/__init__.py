"""Scripts of the peers: each is one file, is given one job file, and shares no code with anything."""
