"""`python -m npllama` is `npllama`."""

import sys

from .cli import main

sys.exit(main())
