"""Decode kernels: a C++ extension on CPU. kvcache/decode.py defines what they compute."""
