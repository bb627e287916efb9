"""From Hugging Face directories and back: one table per family, read in both directions, and the stream between.

`convert` compiles the table of moves. `family` is what a family is, made of `mappings` of tensors and
`config_mappings` of `config.json` (`entries`, `windows`, `rope_scalings`); `families` finds one: `llama`, `mistral`,
`qwen`, `phi3`, `granite`, `glm`, `gemma`, `olmo2`, `mixtures`, `nemotron`, `nemotron_h`, `bamba`, `mamba2`,
`state_spaces`, `hybrid`, and `pruned` for layers that differ. `shards`, `quantized` and `weights` are files of tensors,
`hf_assets` what lies beside them, `remote_code` the classes that go with a model (`modeling_hybrid`,
`modeling_pruned`), `transformers_model` opens a directory in transformers.
"""
