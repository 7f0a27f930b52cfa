"""Effects: disk, network, devices and processes. Imports neither the models, transport nor evaluation."""
