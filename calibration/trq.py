"""Finds the timestep at which a one-step model bears quantization best; see `qartsr_pipeline.calibration.trq`."""

from qartsr_pipeline.calibration.trq import main

if __name__ == "__main__":
    main()
