"""The tiny models: made of random weights, or trained; their tasks, tokens and files."""
