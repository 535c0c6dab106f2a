"""Encoders, fusion and heads."""
