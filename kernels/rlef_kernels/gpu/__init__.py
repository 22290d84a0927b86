"""The operations of this package for NVIDIA GPUs, in Triton and cuBLAS.

The public functions import this package for CUDA tensors only (`rlef_kernels.dispatch`), so nothing
else needs Triton. `head`, `head_gradient`, `products`, `tiles` and `plan` are shared by the
operations; every other file belongs to one operation.
"""
