"""What server and site agree on; imports neither of them."""
