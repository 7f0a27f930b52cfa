"""Choosing how to sample a frozen flow model: fidelity to its exact solution, learned solvers, schedules by budget."""
