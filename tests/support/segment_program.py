"""`megatron-ext vision-segment` as a script: `python segment_program.py --preset mambavision-nano ...`."""

import sys

from megatron_ext import cli

if __name__ == "__main__":
    sys.exit(cli.main(["vision-segment", *sys.argv[1:]]))
