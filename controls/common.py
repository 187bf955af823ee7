"""`python controls/NAME.py` finds this file in place of the project's common.py, and ends with the right command."""

import os
import sys

name = os.path.splitext(os.path.basename(sys.argv[0]))[0]
sys.exit(f"error: from the project's folder, run it as: python -m controls.{name}")
