"""Tables, HTML pages and image grids."""
