"""Proximal policy optimisation of a language model: the mathematics, the rollout, the loop, the pipeline stage."""
