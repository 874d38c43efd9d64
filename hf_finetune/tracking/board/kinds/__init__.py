"""How each kind of record is drawn, one file a kind: pure functions from a record to TensorBoard summaries."""
