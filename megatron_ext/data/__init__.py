"""What models are trained on: text files to Megatron's data sets, and from these to the batches of a rank.

`corpus` is `megatron-ext data`, with `documents` and `lines`; `manifest` and `index` say whether a data set is whole.
`batch` reads Megatron's data sets, `packing` makes passes whose samples stay the same, `sample_id` names a sample by
its content, `schema` is what any model's batch is made of and which rank gets what of it, `splits` finds empty ones
early.
"""
