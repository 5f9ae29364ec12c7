"""Array mathematics of hardset: arrays and tensors in, arrays and tensors out."""
