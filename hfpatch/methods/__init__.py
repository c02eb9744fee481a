"""One file per method: its config, its class, its paper. The file's name is the method's name."""
