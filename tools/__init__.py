"""How the book is built: `python -m tools.build` executes notebooks, generates a page and calls Sphinx."""
