"""`megatron-ext convert`: between Hugging Face, Megatron's GPTModel and checkpoints.

`job` is the command, `verify` loads both models and compares what they compute. The tables of the families are in
`checkpoint/huggingface/`.
"""
