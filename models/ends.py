"""How a level ends with an action; in a module of its own, for those who read data without JAX."""

GOES_ON, LOST, SOLVED, ENDED, TIME_UP = range(5)
"""Not at all, unsolved, solved, in a way that is not told, or because time was up."""
