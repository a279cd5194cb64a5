"""What cnnkern does for one model on this machine: `cnnkern bench MODEL`, and `cnnkern.benchmark` in Python."""
