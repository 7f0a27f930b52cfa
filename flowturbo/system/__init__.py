"""Disk, processes and the command line."""
