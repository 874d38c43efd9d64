"""From files and the Hub to the micro-batches of a rank."""
