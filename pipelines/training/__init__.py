"""Samples joined with columns -> batches -> a trained classifier."""
