"""`megatron-ext convert`: between Hugging Face, Megatron's GPTModel and checkpoints.

`job` is the command, `options` its flags, `hub` fetches models by name; `verify` compares what both models compute,
`megatron_logits` runs Megatron's. The tables of the families are in `checkpoint/huggingface/`.
"""
