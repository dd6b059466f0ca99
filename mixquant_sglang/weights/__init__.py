"""Weights as they lie in files and come in updates: checkpoints, ready-made NVFP4 weights, and packing anew."""
