"""The selective scan of Mamba-1: h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T,  y_t = h_t C_t + D x_t.

Each channel has a state of its own, with a decay rate for every entry of it; that is what sets it apart from Mamba-2's
scan (`ops/ssd`), whose heads share one. x and dt (b, l, d), A (d, n), B and C (b, l, n), h (b, d, n). Source: Gu and
Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", arXiv 2312.00752, section 3, algorithm 2.

    naive.py         the recurrence, token by token
    cpu.py           block by block in plain torch, with a backward by hand
    triton.py        in fused kernels, which lie in triton_kernels.py
    exportable.py    by doubling, of nothing but elementary operations: for torch.export and ONNX
"""
