"""What runs when: the flows, the commands of the terminal, the servers of a team.

May import tasks, and of rlhf the names that its packages hand out, and modules as namespaces; neither torch nor MLflow.
"""
