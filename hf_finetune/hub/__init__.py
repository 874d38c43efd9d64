"""Push a finished adapter to the Hub."""
