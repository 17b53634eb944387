"""Training of the full-precision one-step model itself."""
