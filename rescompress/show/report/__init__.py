"""Tables and pages made from manifests."""
