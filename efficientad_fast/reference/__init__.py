"""The specification in plain PyTorch: the oracle of every test, and the kernel where nothing is compiled.

Imports torch alone. ``networks`` holds the three networks, ``maps`` what follows them, ``preprocess`` what comes
before, ``losses`` and ``quantile`` what training and calibration need.
"""
