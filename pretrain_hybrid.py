"""Pre-train a Transformer, Mamba-2 or hybrid model, or measure one: `torchrun pretrain_hybrid.py --preset NAME ...`."""

import sys

from megatron_ext.cli import main

if __name__ == "__main__":
    sys.exit(main(["pretrain", *sys.argv[1:]]))
