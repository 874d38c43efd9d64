"""What classifiers and regressors are made of here: labels, texts, losses, metrics."""
