"""Search: from one run to a front, on one machine or many."""
