"""What every stage stands on: files, column groups, the record of a run, running work per shard, progress."""
