"""Runtimes: one file each."""
