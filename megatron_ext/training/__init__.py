"""The engine: from a command line to a run in Megatron's own loop. It knows nothing of the jobs that use it.

Read in this order: `job` (what a command is), `run_job`, `command_line` (parsing and every check), `step` (what is
trained and measured), `loop` and `validation` (training, `--skip-train`), `forward` (passes without training),
`extra_models` (a teacher, an encoder, a router beside the model; `extra_optimizers` train them), `dry_run`,
`run_directory` and `signals` (how a run is stopped). What a model is, `families` says.
"""
