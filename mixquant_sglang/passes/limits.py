"""Numbers by which passes are scheduled, each with the measurement behind it.  No torch: the planner asks them too."""

from mixquant_sglang.kernels.limits import FEW_ROWS

# Protected rows that a captured prefill graph can hold.  A pass with more of them runs eagerly: it is then a large
# batch of short requests, whose kernels are long enough to hide their launches.
GRAPH_ROWS = FEW_ROWS

# Multiplications of a linear, on average, from which on a pass without protected rows, such as a middle chunk of a long
# prompt, runs eagerly where graphs have slots for them.  The kernels of protected rows return at once, but for Qwen3-8B
# on an H200 that takes 0.25 ms of a pass.  So large a linear takes 0.45 ms there in FP8, its launches far less.
EAGER_PRODUCTS = 1 << 38

# Pairs of a query and a key from which on the last layer's attention leaves out rows that nobody reads.  2M pairs of
# Qwen3-8B take FA3 65 us on an H200; with half of them, it is estimated, picking the rows takes as long.
ATTENTION_PAIRS = 1 << 20
