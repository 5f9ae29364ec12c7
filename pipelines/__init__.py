"""Ray Data and Ray Train stages over shards and run directories."""
