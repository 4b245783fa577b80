"""`python -m fuse_pass`."""

import sys

from fuse_pass.cli import main

sys.exit(main())
