"""Embedded data sets for simulations."""
