"""What came out, for people and for machines: figures, reports, the gate, and trackers. Nothing heavy is imported here."""
