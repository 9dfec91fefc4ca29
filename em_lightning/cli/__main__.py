"""``python -m em_lightning.cli`` is ``em-lightning``."""

import sys

from em_lightning.cli import main

sys.exit(main())
