"""What a person types: the app, options, output and one file a command. Importing this loads no torch."""
