"""`python -m jpeft.cli`."""

import sys

from jpeft.cli.main import main

sys.exit(main())
