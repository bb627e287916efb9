"""What models are trained on: text files to Megatron's data sets, and from these to the batches of a rank.

`corpus` is `megatron-ext data`, with `documents` and `lines`; `manifest` and `index` say whether a data set is whole.
`batch` reads Megatron's data sets, `packing` makes passes whose samples stay the same, `sample_id` names a sample by
its content, `schema` is the batch of a model that reads other things than text, `splits` finds empty ones early;
`context_parallel` says which part of a sequence a rank has.
"""
