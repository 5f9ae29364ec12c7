"""What a corpus will take, from a few measured shards."""
