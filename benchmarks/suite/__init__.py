"""What runs: the plan, the groups that are timed in the same rounds, the clock, and the rows that are kept."""
