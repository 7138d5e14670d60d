"""A plan of tasks on a Ray cluster: `owl sweep --ray`."""

import os

# A task that Ray's memory monitor ends is begun again without end, else; Ray reads this when it is
# imported. As often as `run.RETRIES` for any other death.
os.environ.setdefault("RAY_task_oom_retries", "3")
