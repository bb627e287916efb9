#!/usr/bin/env bash
# The newcomer's ten minutes: train a small hybrid model, halve it, distil it back. OUT=DIR puts the run elsewhere.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
make .venv/.ready
exec .venv/bin/megatron-ext demo --out "${OUT:-runs/demo}"
