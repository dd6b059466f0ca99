"""``mixquant quantize``: an NVFP4 checkpoint from a BF16 one, layer by layer, and what an interruption leaves of it."""
