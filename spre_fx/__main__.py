"""`python -m spre_fx`."""

import sys

from spre_fx.cli import main

sys.exit(main())
