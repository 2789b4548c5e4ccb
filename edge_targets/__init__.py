"""Edge devices: catalogue, runtimes, latency measured and predicted."""
