"""What other libraries are told of us, by their own conventions: each part needs that library."""
