"""Training of the small full-precision models that ship."""
