"""Everything that can be known to be wrong before weights load: first what needs no torch, then the rest."""
