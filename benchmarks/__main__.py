"""`python -m benchmarks train|inference|data`."""

import sys

from .train import main

sys.exit(main())
