"""A student that learns from a teacher.

`job`, `options` and `setup` are the command; `model` is student and teacher as one chunk for Megatron;
`intermediate_layers` and `projections` match hidden states. `teachers/` says where a teacher's states come from,
`logit_cache/` stores them. The losses themselves are in `lm_head/`.
"""
