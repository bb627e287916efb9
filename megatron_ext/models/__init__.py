"""What a model is, as values and in formulas: nothing here trains or stores one.

`pattern` is the layer string, `architecture` the whole model (its sizes are `dimensions`), `axes` which axis each
dimension of each tensor lies on, `megatron_args` Megatron's arguments as an architecture (rows of `argument_mappings`),
`presets` the named ones and `presets_table` how they are shown; `rope_extension` is a model at a longer sequence,
`rope_scaling` how its rotary positions are scaled (`rope_frequencies` in numbers); `cost` and `training_cost`
count, with `loss_buffers` of the loss.
`reference` is the model in plain float64, to read and to test against. `builder`, `specs`, `rotary`, `heads_norm` and
`module_builder` make Megatron build it, `bootstrap` chooses what stands behind its modules,
`linear_sublayer` is a kind of layer that Megatron does not have; `hooks` takes states out of it.
"""
