"""Shards of a corpus: found, read strictly, checked, copied."""
