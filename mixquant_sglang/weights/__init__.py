"""Ready-made NVFP4 weights (recipe key ``prefill.weights``): read from a checkpoint beside the BF16 one."""
