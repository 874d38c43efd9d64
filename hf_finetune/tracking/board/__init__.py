"""TensorBoard: events are a picture of what the run folder holds, drawn while a run goes on or again at any time.

metrics.jsonl -> scalars    observations/ -> kinds/    samples.jsonl, recipe.yaml -> texts    all -> rebuild
"""
