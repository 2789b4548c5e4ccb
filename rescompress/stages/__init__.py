"""What each stage does: open files, call the pure functions of the siblings, save what they return.

This is the only package where compress, export and edge_targets meet. `rescompress.plan` builds the stages of a run or a
command from these functions; `rescompress.pipeline` orders and records them.
"""

from rescompress.stages.export import exported
from rescompress.stages.network import dense, finetuned, pruned, quantized
from rescompress.stages.shared import network_of
from rescompress.stages.target import target

__all__ = ["dense", "exported", "finetuned", "network_of", "pruned", "quantized", "target"]
