"""The state-space operations as Triton kernels: for CUDA devices, and for the interpreter's check on a CPU."""
