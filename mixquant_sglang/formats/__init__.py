"""The number formats, in plain torch: quantise, dequantise, pack, scale layouts. No SGLang, no kernels."""
