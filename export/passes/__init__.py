"""Repairs of ONNX files: one file per pass."""
