"""Mechanisms, accounting and noise."""
