"""The command line: the app, options, output and one file per command. Importing this loads no torch."""
