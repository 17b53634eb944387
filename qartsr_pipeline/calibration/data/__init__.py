"""Training and calibration pictures: photographs, procedural images, and how they are degraded."""
