"""``python -m benchmarks.peers``: this package's raw maps beside those of the usual ways to run such networks.

What is timed: from a preprocessed float32 batch ``(N, 3, H, W)`` in memory to both raw maps, float32
``(N, 1, h, w)`` in memory. Every contestant has the same weights, input and number of threads, and a process of its
own; they take turns, in several rounds, so that what drifts hits all alike, and wait without computing while others
run. Results count once they agree with a float64 reference (`contest.LARGEST_ERROR`). The ratio is to the fastest
rival in float32; rivals in int8 have rows of their own.

No rival is handicapped; what each is given stands in its function in `contestants.py`. Those that are not installed are
named, and come with ``pip install 'efficientad-fast[bench]'``.
"""

INPUT, OUTPUTS = "batch", ("map_st", "map_ae")
"""Names in the ONNX file."""
