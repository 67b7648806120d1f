"""What `rlhf up` keeps alive on a machine: servers, a worker, deployments; and runs that died, found and named.

May import the flows and tasks.
"""
