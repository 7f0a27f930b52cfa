"""One file for each result: the data, the commands, the time they took and the numbers that came out.

From the repository's root: `python -m recipes.NAME`.
"""
