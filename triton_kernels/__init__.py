"""Triton kernels, a module per operator. Installs as ``efficientad_fast.triton_kernels``."""
