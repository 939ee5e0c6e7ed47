"""What numbers of so many rows or seeds can say: intervals, tests, and what a test could not have seen."""

LEVEL = 0.05  # of every test
