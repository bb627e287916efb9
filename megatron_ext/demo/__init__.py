"""`megatron-ext demo`: the product's own commands, one after the other, and a report of what was measured.

`job` runs them, `report` writes and draws what came out, `redraw` is `megatron-ext report`. `real_model` and
`real_report` are the same for a model that others have trained (`--real`).
"""
