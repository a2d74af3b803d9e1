"""A Django app with one table of tasks, which several queues share."""
