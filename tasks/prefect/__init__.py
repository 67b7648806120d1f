"""All that asks a Prefect server or tells it something: its UI, locks, limits, cancelled runs, a worker's folder.

May import rlhf, tasks.run and what lies below it.
"""
