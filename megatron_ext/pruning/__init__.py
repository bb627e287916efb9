"""Scores, a plan, a smaller checkpoint.

`job`, `options`, `checks`, `report`, `plan_page` and `pictures` are the command. `calibration` measures what `scores`
stores (on disk `saved_scores`; `weights` says whose they are): widths by `importance`, `expert_importance` (with
`aggregations`) and `magnitude`, depth by `depth_metrics`: `depth` in one pass, `leave_out` and `shapley` by `ablation`,
`task_scoring` by a task, `left_out` being how sub-layers are left out and `depth_cost` what that takes. `budget` and
`select` make of them a `plan`; `apply` cuts, and `merge` folds heads. What stands in place of dropped sub-layers is a
`recovery`, of which `fitting` runs the model and `emulation` is the regression.

The job, `activations`, `saved_plan`, `apply` and what leaves layers out know no family of models: `pruned_family` is
what they ask of one, `language_models` answers for layer patterns, `vision/pruning` for image networks.
"""
