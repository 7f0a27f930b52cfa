"""`python -m flowturbo.web`: web.py where the package is installed without the repository."""

from flowturbo.system import cli
from flowturbo.web.launch import main

if __name__ == "__main__":
    cli.run_script(main)
