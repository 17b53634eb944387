"""`qartsr evaluate` from a checkout: the same command, see qartsr_pipeline/cli/evaluate.py.

python calibration/evaluate.py tiny-fp tiny-w8a8 tiny-w4a4 --data PHOTOS --output report.json
python calibration/evaluate.py reproduce --ours report.json
"""

import sys

from qartsr_pipeline.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
