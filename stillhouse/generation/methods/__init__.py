"""Ways to make new data from seeds; each is one file."""
