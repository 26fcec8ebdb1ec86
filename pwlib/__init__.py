"""pwlib."""
