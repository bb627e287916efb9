"""The state-space scan of Mamba-2 (SSD): S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T,  y_t = S_t C_t + D x_t.

Each head by itself; x (b, l, h, p), dt (b, l, h), A (h), B and C (b, l, g, n), S (b, h, p, n). Source: Dao and Gu,
"Transformers are SSMs", arXiv 2405.21060, section 2 for the recurrence and 6 for the chunked algorithm.

    naive.py         the recurrence, token by token
    cpu.py           in chunks, in plain torch; cpu_chunks.py does a block of them, cpu_decays.py their decays
    triton.py        in chunks, in fused kernels; triton_tiling.py has their sizes, and the kernels lie in
                     triton_decay_kernels.py, triton_state_kernels.py, triton_forward_kernels.py and
                     triton_backward_kernels.py
    decode.py        one more token in plain torch; triton_decode.py and triton_decode_kernel.py on a GPU
    step_sizes.py    dt after bias, softplus and limits
"""
