"""One file a task; `base` is the contract that each keeps. Files that begin with `_` hold what tasks share."""
