"""Settings, checked before anything starts."""
