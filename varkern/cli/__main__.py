"""``python -m varkern.cli``."""

import sys

from . import main

sys.exit(main())
