"""The things that every room uses: errors, sizes, checked settings, atomic files, models by name, patterns as text."""
