"""Secure aggregation as two state machines without I/O."""
