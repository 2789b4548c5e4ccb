"""ONNX out: writing, parity, repair passes and lint."""
