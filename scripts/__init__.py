"""What developers run beside the package: benchmarks, quality, small models, tools.  Not part of the wheel."""
