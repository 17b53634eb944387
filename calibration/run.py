"""The command `qartsr quantize`, as a script of a checkout, for `accelerate launch calibration/run.py`."""

from __future__ import annotations

import sys

from qartsr_pipeline.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["quantize", *sys.argv[1:]]))
