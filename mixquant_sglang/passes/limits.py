"""Numbers by which passes are scheduled, each with the measurement behind it.  No torch: the planner asks them too."""

from mixquant_sglang.kernels.limits import FEW_ROWS, MANY_ROWS

# Protected rows that a captured prefill graph can hold; of a model with experts, whose kernel takes no more.
GRAPH_ROWS = MANY_ROWS
EXPERT_GRAPH_ROWS = FEW_ROWS

# Rows of a pass from which on it runs without its graph if it protects more than FEW_ROWS: cuBLAS multiplies them in
# half the time of the graph's kernel, and the pass is long enough to hide its launches. An estimate: FP8 computes 4096
# rows of Qwen3-8B in 60 ms on an H200, where the launches of an eager low pass took 60.
EAGER_TOKENS = 4096

# Pairs of a query and a key from which on the last layer's attention leaves out rows that nobody reads.  2M pairs of
# Qwen3-8B take FA3 65 us on an H200; with half of them, it is estimated, picking the rows takes as long.
ATTENTION_PAIRS = 1 << 20

# SGLang replays no prefill graph of more than so many times a pass's rows: _MAX_PREFILL_CUDA_GRAPH_PADDING_FACTOR of
# its prefill_cuda_graph_runner.
PADDING = 2
