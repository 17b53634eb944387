"""Makes new weights: trains the small full-precision model and quantizes models. Used from a checkout, not in the wheel."""
