"""From a trained ResNet checkpoint to a smaller, faster, INT8-exact artifact for an edge device."""
