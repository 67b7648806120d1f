"""All that knows MLflow: a run's journal, the process that ships it, the registry, models that MLflow serves.

May import rlhf and tasks.processes.
"""
