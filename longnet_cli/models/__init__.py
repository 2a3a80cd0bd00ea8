"""Models as users have them: the folder that `--model` names, other libraries' models, official checkpoints."""
