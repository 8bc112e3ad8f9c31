"""``python -m tokenpass``: the command line."""

import sys

from tokenpass.cli import main

sys.exit(main())
