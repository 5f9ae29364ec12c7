"""Who is near whom: the nearest samples of every sample, duplicates among them, and their vote on its label."""
