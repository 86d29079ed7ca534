"""``python -m kvselect`` is the command ``kvselect``."""

import sys

from kvselect.cli import main

sys.exit(main())
