"""One cached Prefect task per stage, and what ships their numbers to MLflow."""
