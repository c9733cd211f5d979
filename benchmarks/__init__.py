"""Side-by-side measurements of `keras_mamba2` and its peers: `python -m benchmarks --help`."""
