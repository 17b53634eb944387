"""What `calibration.compare` is made of: methods, cells and how they are made and measured, tables."""
