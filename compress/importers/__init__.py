"""The ways in for networks that are described by their computation: modules, archives, ONNX, Keras configurations."""
