"""The setting TASKS of the tests in which real workers serve the backends."""

from __future__ import annotations

import json

OURS = "modelqueue.task_backend.ModelQueueBackend"
#: The shortest lease, as tests wait for its end.
SERVED = {
    "default": {
        "BACKEND": OURS,
        "QUEUES": ["default", "mail"],
        "OPTIONS": {"lease": 3, "retry": 2},
    },
    "reports": {"BACKEND": OURS, "QUEUES": ["nightly"]},
    "any": {"BACKEND": OURS, "QUEUES": []},
}

#: What the environment of a worker says, so that it serves them.
VARIABLES = {"MODELQUEUE_TEST_TASK_BACKENDS": json.dumps(SERVED)}
