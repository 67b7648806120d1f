"""One cached Prefect task per stage, and what ships their numbers to MLflow."""

__version__ = "0.1.0"
