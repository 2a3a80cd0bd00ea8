"""The command line: the app, options, output and one file per command. Importing this does not load torch."""
