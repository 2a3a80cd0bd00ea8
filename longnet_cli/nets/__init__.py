"""The nets of `longnet`: what jobs need from one, the LongNet, the slide encoder, their weights on disk."""
