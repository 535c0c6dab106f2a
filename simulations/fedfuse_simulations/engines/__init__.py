"""Ways to run the same ServerApp and ClientApp on one machine."""
