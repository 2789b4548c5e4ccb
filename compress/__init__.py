"""Pruning, training and quantization of ResNets."""
