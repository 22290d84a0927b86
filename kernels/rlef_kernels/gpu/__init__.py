"""The operations of this package for NVIDIA GPUs, in Triton and cuBLAS.

The public functions come here for CUDA tensors (`rlef_kernels.dispatch`); this package is imported
only then, so that nothing else needs Triton. `head` and `head_gradient` do what every operation on
a language model's head shares; the other files are one operation each.
"""
