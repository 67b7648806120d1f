"""What runs when: the pipeline flow and the command line."""
