"""The calibration method, as a library."""
