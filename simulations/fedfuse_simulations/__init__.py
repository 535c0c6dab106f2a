"""Scenarios, engines and the simulator."""
