"""Choosing how to sample a frozen flow model: learned solvers, schedules by budget."""
