"""Other tools: each part needs the package that it is named after, and is imported by whoever asks for it."""
