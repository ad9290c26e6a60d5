"""The parts of `benchmarks.kernel_report`: compiling without a GPU, reading what tools print, limits of GPUs."""
