"""The state-space layer (Mamba-2): chunked scan, causal convolution, gated norm, and how they are reached.

`naive` says what is meant, `chunk`, `conv` and `norm` do it fast in plain torch, `triton` does on a GPU, `dispatch`
chooses, and `mamba_ssm_api` puts the choice behind the signatures that Megatron-Core calls.
"""
