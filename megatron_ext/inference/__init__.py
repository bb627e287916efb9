"""A trained model on any layout: every rank makes the same call, and every rank gets the result.

`job` is `megatron-ext generate`, `options` its flags; `session` opens a checkpoint and its `tokenizer`, `sharded` sends
micro-batches through it. `generate` continues what `request` asks (`prompts`, `chat`), with the caches of `cached` and
the choice of `sampling`; `score` is the probability of a text (`loglikelihood`); `speed` measures, and `interrupt` ends
both well.
"""
