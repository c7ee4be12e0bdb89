"""Strategies: how one model is trained by many processes, one file each behind the seam of base.py."""
