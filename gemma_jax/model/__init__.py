"""The model as pure functions of parameters, tokens and State. Knows no files, text or command line."""
