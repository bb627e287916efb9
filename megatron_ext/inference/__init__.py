"""A trained model on any layout: every rank makes the same call, and every rank gets the result.

`job` is `megatron-ext generate`; `session` opens a checkpoint, `sharded` sends micro-batches through it, `generate` and
`score` are the two things that are done with it.
"""
