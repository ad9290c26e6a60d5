"""Prints the EFFICIENTAD_FAST_BUILD of which this machine must be able: cuda where nvcc and PyTorch fit, else cpu."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import build_backend as backend

nvcc = backend.find_nvcc()
versions = [torch.version.cuda, nvcc and backend.Nvcc(nvcc).version()]
majors = {backend.version_tuple(version)[0] if version else None for version in versions}
print("cuda" if len(majors) == 1 and None not in majors else "cpu")
