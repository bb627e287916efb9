"""Compressing and training models on Megatron-Core.

An engine below (`training`, `families`, `checkpoint`, `models`, `ops`, `lm_head`, `data`, `reports`), features above
(`pretraining`, `pruning`, `distillation`, `conversion`, `evaluation`, `inference`, `demo`), each with its own job,
options and report.
docs/architecture.md is the map.
"""
