"""One cached Prefect task per stage, and what connects a run to Prefect, to MLflow and to processes of its own.

May import rlhf.
"""
