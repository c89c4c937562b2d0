"""`python -m asgd_mpi.report`."""

import sys

from asgd_mpi.report import main

sys.exit(main())
