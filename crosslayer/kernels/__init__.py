"""The few GPU kernels that profiling proved worth writing, each next to a twin in plain PyTorch."""
