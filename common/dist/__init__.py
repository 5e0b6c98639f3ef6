"""Process groups and what runs over them."""
