"""Hours of load in minutes: agents, faults, and books of what came back."""
