"""What a finished run is worth: metrics with intervals on any labelled rows, by slice, and against another model."""
