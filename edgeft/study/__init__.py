"""A study: many runs from one file, what they share done once, and one page about all of them."""
