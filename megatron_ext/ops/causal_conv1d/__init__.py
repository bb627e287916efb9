"""The causal convolution of each channel by itself: y_t = act(bias + sum_j weight[:, w-1-j] x_{t-j}), j < w.

x (b, l, d), weight (d, w) with few taps w, bias (d), act SiLU or none: what Mamba-2 does to x, B and C before the scan
(arXiv 2405.21060, section 7). Taps do not reach into another document.

    naive.py            the definition, tap by tap
    cpu.py              blocks of tokens in plain torch, with a backward by hand
    triton.py           launches of the kernels in triton_kernels.py, for a sequence and for one more token
    decode.py           one more token in plain torch
"""
