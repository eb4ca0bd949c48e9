"""The stages: each module is one command, and reads top to bottom; the rest of the package is what they compose."""
