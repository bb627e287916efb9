"""A trained model on any layout: every rank makes the same call, and every rank gets the result.

`job` is `megatron-ext generate`; `session` opens a checkpoint and its `tokenizer`, `sharded` sends micro-batches
through it. `generate` continues what `request` asks (`prompts`, `chat`), with the caches of `cached` and the choice
of `sampling`; `loglikelihood` is that of a `passage`; `speed` measures, and `interrupt` ends both well.
"""
