"""Tests that say what they could have seen: sample sizes, intervals, p-values and the smallest effect found with 80 % power."""
