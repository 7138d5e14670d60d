"""A plan of tasks on a Ray cluster: `owl sweep --ray`."""
