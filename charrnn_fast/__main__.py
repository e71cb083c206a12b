"""python -m charrnn_fast: the command line."""

import sys

from charrnn_fast.cli import main

sys.exit(main())
