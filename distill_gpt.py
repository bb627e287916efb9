"""Train a model to match another: `torchrun distill_gpt.py --distill-teacher DIR --pretrained-checkpoint DIR ...`."""

import sys

from megatron_ext.cli import main

if __name__ == "__main__":
    sys.exit(main(["distill", *sys.argv[1:]]))
