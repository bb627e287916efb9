"""Cut a trained model to a smaller one: `torchrun prune_gpt.py --load DIR --save DIR --prune-target-params 0.5 ...`."""

import sys

from megatron_ext.cli import main

if __name__ == "__main__":
    sys.exit(main(["prune", *sys.argv[1:]]))
