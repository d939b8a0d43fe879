"""The few GPU kernels that profiling proved worth writing, each next to a twin in plain PyTorch.

Callers import NAME, which takes the twin or the kernel by the device of its tensors. NAME_triton has the kernel and how
it is launched, where that is much in NAME_launch: imported only where there is a GPU. `project` puts these together
with the matrix products of a layer; its own kernels are those of `few_rows`.
"""
