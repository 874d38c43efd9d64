"""Predictions for any number of rows: read, predicted and written in windows, in order, in bounded memory."""
