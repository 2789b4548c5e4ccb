"""What is done with a network: configs, plans, the pipeline of stages, and what each stage does."""
