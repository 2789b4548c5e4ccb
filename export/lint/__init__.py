"""Lint of ONNX files against a target: one file per rule."""
