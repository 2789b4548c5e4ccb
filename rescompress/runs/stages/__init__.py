"""What each stage does: open files, call the pure functions of the siblings, save what they return.

This is the only package where compress, export and edge_targets meet. `rescompress.runs.plan` builds the stages of a run or a
command from these functions; `rescompress.runs.pipeline` orders and records them.
"""

from rescompress.runs.stages.deploy import deployed
from rescompress.runs.stages.export import exported
from rescompress.runs.stages.network import dense, finetuned, pruned, quantized
from rescompress.runs.stages.shared import network_of
from rescompress.runs.stages.target import target

__all__ = ["dense", "deployed", "exported", "finetuned", "network_of", "pruned", "quantized", "target"]
