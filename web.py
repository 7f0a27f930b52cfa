"""The web page on this machine: see flowturbo/web/launch.py. Also `python -m flowturbo.web`."""

from flowturbo.system import cli
from flowturbo.web.launch import main

if __name__ == "__main__":
    cli.run_script(main)
