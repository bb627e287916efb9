"""`megatron-ext pretrain`: the job that trains a language model, or measures one with `--skip-train`."""
