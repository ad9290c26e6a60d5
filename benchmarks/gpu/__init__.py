"""Parts of `benchmarks.roofline`, `gpu_check` and `gpu_peers`: what GPUs can do, what steps need, what they take."""
