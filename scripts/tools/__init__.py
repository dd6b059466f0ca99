"""The demo, the fuzzer, and what checks or draws things."""
