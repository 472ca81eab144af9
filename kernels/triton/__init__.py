"""The op in Triton: for NVIDIA GPUs without our CUDA kernels, and for AMD GPUs.

Importing this needs Triton (``pip install emovec[triton]``; torch's own GPU wheels bring it). ``import emovec`` does not.
"""

from .apply import apply_, launch, register

__all__ = ["apply_", "launch", "register"]
