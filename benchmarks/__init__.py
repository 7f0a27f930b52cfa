"""What benchmark.py measures with: the device's clock and roofline, the variants it compares, tables and plots."""
