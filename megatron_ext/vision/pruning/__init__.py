"""`megatron-ext prune` on image networks: blocks, and what is inside them; the channels of a stage stay.

`job` and `options` are the command, `networks` what the job of pruning asks. `axes` says which dimension of which
weight lies on which axis; `activations`, `magnitude` and `depth` make `scores`, `targets` and `plan` say what stays,
`report` shows it.
"""
