"""Figures of stages as rows and columns, read by reports, the gate and the tables of the command line."""
