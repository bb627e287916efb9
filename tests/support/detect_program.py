"""`megatron-ext vision-detect` as a script: `python detect_program.py --preset mambavision-nano ...`."""

import sys

from megatron_ext import cli

if __name__ == "__main__":
    sys.exit(cli.main(["vision-detect", *sys.argv[1:]]))
