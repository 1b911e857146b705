"""The commands of the command line, a module each. verb.py says what a command is made of, cli.py lists them."""
