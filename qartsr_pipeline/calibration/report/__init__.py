"""What a calibration writes: the report, the model card, the folder."""
