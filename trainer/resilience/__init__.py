"""Resilience: being asked to stop, and where the time went."""
