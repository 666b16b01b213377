"""Triton kernels: tensors in, tensors out; no megatron-core, no process groups, no autograd."""
