"""Attention kernels: a C++ extension on CPU, Triton on GPU. sparse/attention.py defines what they compute."""
