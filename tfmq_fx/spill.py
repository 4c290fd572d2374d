"""Values beyond a budget of memory, in files."""
