"""The command line: Typer, rich, and nothing heavy until a command runs."""
