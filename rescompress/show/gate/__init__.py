"""Verdicts from manifests: may this run take the place of its baseline? Needs neither torch, numpy nor onnx."""

from rescompress.show.gate.checks import Check, GateReport, Run, Verdict, judge, load_run
from rescompress.show.gate.limits import Limits, limits_of, load_limits

__all__ = ["Check", "GateReport", "Limits", "Run", "Verdict", "judge", "limits_of", "load_limits", "load_run"]
