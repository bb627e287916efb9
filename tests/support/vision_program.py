"""`megatron-ext vision` as a script: `python vision_program.py --preset mambavision-nano ...`."""

import sys

from megatron_ext import cli

if __name__ == "__main__":
    sys.exit(cli.main(["vision", *sys.argv[1:]]))
