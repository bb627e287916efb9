"""Compressing and training models on Megatron-Core.

An engine below (`training`, `families`, `data`, `reports`, `checkpoint`, `lm_head`, `models`, `ops`, `options`,
`platform`), features above (`pretraining`, `pruning`, `distillation`, `conversion`, `evaluation`, `inference`,
`compression`, `demo`), each with its own job, options and report; a wing, `vision`, on top; `estimate` and `verify` are
commands of one file. `cli` and `__main__` are the ways in, `program` is how every command ends, `torchrun` starts
several ranks, `workflow` runs commands one after the other,
`completion` completes them in a shell; `errors` are what a user can do wrong, and `untrusted`
reads files of others. docs/architecture.md is the map.
"""
