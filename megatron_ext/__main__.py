"""`python -m megatron_ext JOB` and `torchrun -m megatron_ext JOB`: the console command where it is not on the path."""

import sys

from megatron_ext.cli import main

if __name__ == "__main__":
    sys.exit(main())
