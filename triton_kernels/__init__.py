"""Triton kernels, a file an operator; launchers carry the operators' schemas, `cnnkern.backends` registers them."""
