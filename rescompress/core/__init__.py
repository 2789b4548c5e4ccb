"""The shared language of all packages: no torch, numpy or onnx at import time."""
