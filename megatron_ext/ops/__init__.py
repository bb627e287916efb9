"""Operations of layers and of generation, one folder each: a naive form that says what is meant, and fast ones.

    ssd/             the chunked state-space scan of Mamba-2
    selective_scan/  the scan of Mamba-1, with a state and decay rates for each channel
    causal_conv1d/   the short causal convolution before it
    gated_norm/      the root-mean-square norm with a gate after it
    swiglu/          the gated activation of an MLP, for a CPU
    rotary/          rotary position embedding, for a CPU
    causal_attention/  attention of a sequence to itself in training, for a CPU
    cached_attention/  attention of one more token to a cache, for generation
    mamba_mixer/     all between a layer's two projections as one function: convolution, scan, norm and gate

In each folder `naive.py` is the definition, `cpu.py` plain torch with a backward by hand, made for a CPU's cache and
right on any device, `triton.py` the fused kernels' launches and `triton_*kernel*.py` the kernels.

    dispatch.py        which form runs: by `--ext-ssm-backend`, or by device, dtype and sizes
    autotune.py        ours or mamba-ssm's on a GPU that has both: measured once, remembered
    mamba_ssm_api.py   the forms behind the signatures of mamba_ssm and causal_conv1d, which Megatron-Core calls
    transformer_api.py the forms behind the signatures of Megatron-Core's own fused functions
    cache_blocks.py, silu.py, triton_tiles.py, triton_jit.py   what several operations need
"""
