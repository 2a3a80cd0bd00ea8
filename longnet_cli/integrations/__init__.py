"""Dilated attention inside other libraries' models. Each file here needs the library that it is named after."""
