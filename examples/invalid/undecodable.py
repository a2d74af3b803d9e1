# Not valid Python: Latin-1 without saying so, which is not UTF-8. Workers of the demo fail on it.

CAFE = "café"
