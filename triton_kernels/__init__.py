"""Triton kernels, a file per operator; launchers carry the operators' schemas, `cnnkern.backends` registers them."""
