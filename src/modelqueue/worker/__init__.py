"""The worker: processes that run the tasks of declared queues, and a supervisor that looks after them.

`supervisor` starts the processes, tells them when there is work (`prober`), and stops them. In a process
(`process`) a `claimer` claims as many tasks as there are free `slots`, threads (`threads`) and an event loop
(`loop`) run the actions, and a `completer` writes the outcomes.
"""
