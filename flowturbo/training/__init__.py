"""What train.py consists of: objective, step, resume, log."""
