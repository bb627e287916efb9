"""Attention of one more token to a cache that is longer than what it holds, whose end is told by a tensor.

So the same launches do for every token, as a CUDA graph needs it.

    naive.py            the formula over the whole cache, with a mask
    triton.py           two kernels that read what the cache holds, once for all heads of a group
    triton_kernels.py   these kernels
"""
