"""Reports on benchmark rows for people: a web page, a picture, Markdown."""
