"""Shards -> embeddings -> Gaussians -> difficulty -> subsets: the main job."""
