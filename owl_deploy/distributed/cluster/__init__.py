"""A plan of tasks on a Ray cluster: `owl sweep --ray`."""

import os

RETRIES = 3  # of a task whose worker or node died
# Ray begins a task that it ended for want of memory again without end, unless this says how often.
# It reads that when it is imported.
os.environ.setdefault("RAY_task_oom_retries", str(RETRIES))
