"""Reading what somebody else may have written: how much of it, and what it may claim."""
