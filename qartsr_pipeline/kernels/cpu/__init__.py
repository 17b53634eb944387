"""CPU backends."""
