"""The gated root-mean-square norm: norm(x) silu(z) or norm(x silu(z)), norm(u) = weight u / sqrt(mean(u^2) + eps).

x and z (..., d), weight (d); means are over groups of channels. What follows the scan of Mamba-2 (arXiv 2405.21060,
section 7; RMSNorm: arXiv 1910.07467, section 4).

    naive.py    the definition, group by group
    cpu.py      blocks of tokens in plain torch, with a backward by hand
    triton.py   launches of the kernels in triton_kernels.py
"""
