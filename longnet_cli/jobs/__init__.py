"""The jobs of the commands, which are a library too: each reads inputs, runs a net or none, and yields results."""
