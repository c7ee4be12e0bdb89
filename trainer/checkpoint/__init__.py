"""Checkpoints: names and tensors on disk. Whole and verified, or they do not count."""
