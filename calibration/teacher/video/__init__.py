"""Training of the small video model: WAN's classes, clips made of moving photographs."""
