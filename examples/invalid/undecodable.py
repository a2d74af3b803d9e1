# Not valid Python: Latin-1 without saying so, which is not UTF-8. The worker of the demo fails on it.

CAFE = "café"
