"""Structured pruning: channels and blocks removed from a network, within a budget."""

from compress.prune.apply import apply, pruned_network
from compress.prune.cost import CostFunction
from compress.prune.engine import Choice, PruneResult, choose, load_method, measure, method_names, prune, prune_by_plan
from compress.prune.groups import ChannelGroup, Scope, find_groups, prunable
from compress.prune.method import Context, Curves, ErrorCurve, Method
from compress.prune.plan import Budget, PruningPlan, load_plan

__all__ = [
    "Budget",
    "ChannelGroup",
    "Choice",
    "Context",
    "CostFunction",
    "Curves",
    "ErrorCurve",
    "Method",
    "PruneResult",
    "PruningPlan",
    "Scope",
    "apply",
    "choose",
    "find_groups",
    "load_method",
    "load_plan",
    "measure",
    "method_names",
    "prunable",
    "prune",
    "prune_by_plan",
    "pruned_network",
]
