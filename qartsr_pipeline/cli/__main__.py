"""`python -m qartsr_pipeline.cli`, for `accelerate launch -m`."""

import sys

from qartsr_pipeline.cli.main import main

sys.exit(main())
