"""Numbers by which passes are scheduled, each with the measurement behind it.  No torch: the planner asks them too."""

from mixquant_sglang.kernels.limits import FEW_ROWS

# Protected rows that a captured prefill graph can hold.  A pass with more of them runs eagerly: it is then a large
# batch of short requests, whose kernels are long enough to hide their launches.
GRAPH_ROWS = FEW_ROWS

# Pairs of a query and a key from which on the last layer's attention leaves out rows that nobody reads.  2M pairs of
# Qwen3-8B take FA3 65 us on an H200; with half of them, it is estimated, picking the rows takes as long.
ATTENTION_PAIRS = 1 << 20
