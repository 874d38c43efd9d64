"""Everything written while a model learns: metrics, records, charts, TensorBoard."""
